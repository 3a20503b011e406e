// Package daemon is bangerd: it reads the configuration, puts the parts together, serves the API on a
// socket that only the user can reach, and lets go of the VMs when it ends.
package daemon

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"

	"banger/internal/build"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/vmm/fake"
)

const usage = `bangerd serves banger's VMs to one user. banger starts it when needed.

usage: bangerd [clean | --version | --help]

"clean" takes away what banger made in this host's network, while neither the daemon nor a VM runs.

Its configuration is config.toml in banger's configuration directory.
`

// Main is the program: it runs until SIGTERM or SIGINT, and returns the exit code.
func Main(args []string) int {
	return run(args, os.Stdout, os.Stderr)
}

func run(args []string, stdout, stderr io.Writer) int {
	switch {
	case len(args) > 0 && args[0] == "fake-vmm": // the fake driver's machines are this program
		return fake.Main(args[1:])
	case len(args) == 1 && args[0] == "--version":
		fmt.Fprintln(stdout, "bangerd", build.ID())
		return 0
	case len(args) == 1 && (args[0] == "--help" || args[0] == "-h"):
		fmt.Fprint(stdout, usage)
		return 0
	case len(args) == 1 && args[0] == "clean":
		return report(stderr, clean(context.Background(), paths.FromEnvironment(), stdout, stderr))
	case len(args) > 0:
		return report(stderr, fault.New(fault.Usage, "unknown argument %q", args[0]).WithHint("bangerd --help"))
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// Caught and dropped: a signal that is ignored stays ignored in the programs that are started.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP, syscall.SIGPIPE)
	return report(stderr, Run(ctx, Options{
		Paths:   paths.FromEnvironment(),
		FakeVMM: os.Getenv("BANGER_FAKE_VMM") == "1",
	}))
}

// report prints why the daemon ended, for the client that started it, and returns the exit code.
func report(stderr io.Writer, err error) int {
	if err == nil {
		return 0
	}
	fmt.Fprintln(stderr, "bangerd: error:", err)
	if hint := fault.HintOf(err); hint != "" {
		fmt.Fprintln(stderr, "bangerd: hint:", hint)
	}
	return fault.ExitCode(err)
}
