// Command bangerd is banger's daemon, one per user.
package main

import (
	"os"

	"banger/internal/daemon"
)

func main() { os.Exit(daemon.Main(os.Args[1:])) }
