// Command banger-bench measures banger against a stock boot of the same system in the same run.
package main

import (
	"os"

	"banger/internal/bench"
)

func main() { os.Exit(bench.Main(os.Args[1:])) }
