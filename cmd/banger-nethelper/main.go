// Command banger-nethelper sets up VMs' network devices for bangerd.
package main

import (
	"os"

	"banger/internal/hostnet/helper"
)

func main() { os.Exit(helper.Main()) }
