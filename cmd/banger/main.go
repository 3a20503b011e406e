// Command banger is the command line people use.
package main

import (
	"os"

	"banger/internal/cli"
)

func main() { os.Exit(cli.Main(cli.FromOS())) }
