package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

type forkOptions struct {
	source    string
	name      string
	count     int32
	ephemeral bool
	output    outputFormat
}

// forkView is what became of a fork.
type forkView struct {
	VMs          []vmView `json:"vms"`
	PauseSeconds float64  `json:"pause_seconds"`
}

func newVMForkCommand(e *Env) *cobra.Command {
	var o forkOptions
	cmd := &cobra.Command{
		Use: "fork NAME", Short: "Make further VMs of a running one, as it runs",
		Long: "Make further VMs of a running one: with its disks, its memory and its programs at work, and a name, address, keys\n" +
			"and random numbers of their own. The source stands still for a moment and runs on. Connections over the network\n" +
			"end in the new VMs, programs go on listening. When one of them fails, none is left.",
		Example: "banger vm fork web\nbanger vm fork build --name try --count 4",
		Args:    oneName, ValidArgsFunction: firstOnly(e.completeVMs(isRunning)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.source = args[0]
			return runVMFork(cmd.Context(), o, e)
		},
	}
	cmd.Flags().StringVar(&o.name, "name", "", "name of the new VM; further ones get NAME-2, NAME-3... (default: the source's name and -fork-1)")
	cmd.Flags().Int32Var(&o.count, "count", 1, "how many VMs to make")
	cmd.Flags().BoolVar(&o.ephemeral, "rm", false, "delete them when they stop")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runVMFork(ctx context.Context, o forkOptions, e *Env) error {
	if o.count < 1 {
		return fault.New(fault.Usage, "cannot make %d forks", o.count).WithHint("make at least one: --count 1")
	}
	return e.connected(ctx, saveLimit, func(ctx context.Context, c *client.Client) error {
		d := e.newDisplay()
		defer d.close()
		done, err := c.Fork(ctx, &bangerv1.ForkVMRequest{Vm: o.source, Name: o.name, Count: o.count, Ephemeral: o.ephemeral}, d.sink(""))
		if err != nil {
			return err
		}
		v := forkView{VMs: views(done.GetVms(), viewVM), PauseSeconds: time.Duration(done.GetPauseNanos()).Seconds()}
		return e.print(o.output, v, func() string {
			var names strings.Builder
			for _, made := range v.VMs {
				fmt.Fprintln(&names, made.Name)
			}
			return names.String()
		})
	})
}

type cloneOptions struct {
	source, name string
	output       outputFormat
}

func newVMCloneCommand(e *Env) *cobra.Command {
	var o cloneOptions
	cmd := &cobra.Command{
		Use: "clone NAME [NEW]", Short: "Make another VM of a stopped one",
		Long: "Make another VM of a stopped one, with copies of its disks. It is stopped, and gets an identity of its own when it starts.\n" +
			"Without a name it is called NAME-clone-1, or the next that is free; the name is printed in the end.",
		Example: "banger vm clone web\nbanger vm clone web web2",
		Args:    nameAndNew, ValidArgsFunction: firstOnly(e.completeVMs(isStopped)),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.source = args[0]
			if len(args) > 1 {
				o.name = args[1]
			}
			return runVMClone(cmd.Context(), o, e)
		},
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runVMClone(ctx context.Context, o cloneOptions, e *Env) error {
	return e.connected(ctx, saveLimit, func(ctx context.Context, c *client.Client) error {
		d := e.newDisplay()
		defer d.close()
		made, err := c.Clone(ctx, &bangerv1.CloneVMRequest{Vm: o.source, Name: o.name}, d.sink(""))
		if err != nil {
			return err
		}
		return e.print(o.output, viewVM(made), func() string { return made.GetName() + "\n" })
	})
}
