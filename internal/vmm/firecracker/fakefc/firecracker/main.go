// Command firecracker is the fake of that name: see package fakefc.
package main

import (
	"os"

	"banger/internal/vmm/firecracker/fakefc"
)

func main() { os.Exit(fakefc.Main(os.Args[1:])) }
