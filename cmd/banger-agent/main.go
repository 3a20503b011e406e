// banger-agent is banger's program in the guest: the init of its initramfs, then the service that
// answers the host.
package main

import (
	"os"

	"banger/internal/agent"
)

func main() { os.Exit(agent.Main(os.Args[1:], os.Stdout, os.Stderr)) }
