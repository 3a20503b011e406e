package cli

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

// concurrency bounds how many VMs one command works on at once.
const concurrency = 8

type lifecycleOptions struct {
	names   []string
	force   bool
	yes     bool
	cold    bool
	suspend bool
	vmm     string
	output  outputFormat
}

// verb is one lifecycle command: what it asks the daemon for each VM.
type verb struct {
	use, short, long, example string
	limit                     time.Duration
	fits                      func(state string) bool // for completion
	ask                       func(ctx context.Context, c *client.Client, name string, o lifecycleOptions, sink client.Sink) (*bangerv1.VM, error)
}

func newVMStartCommand(e *Env) *cobra.Command {
	cmd, o := newLifecycleCommand(e, verb{
		use: "start NAME...", short: "Start VMs", limit: bootLimit, fits: isStopped,
		long: "Start VMs. A suspended one is resumed; with --cold it boots anew, without its saved memory and with its disks.",
		ask: func(ctx context.Context, c *client.Client, name string, o lifecycleOptions, sink client.Sink) (*bangerv1.VM, error) {
			return c.Start(ctx, &bangerv1.StartVMRequest{Vm: name, Cold: o.cold, Vmm: o.vmm}, sink)
		},
	})
	cmd.Flags().BoolVar(&o.cold, "cold", false, "boot suspended VMs anew: their saved memory is dropped")
	cmd.Flags().StringVar(&o.vmm, "vmm", "", "run them under this machine monitor from now on: auto, firecracker or qemu")
	if err := cmd.RegisterFlagCompletionFunc("vmm", fixedCompletions(vmms...)); err != nil {
		panic(err) // the flag exists: it was added above
	}
	return cmd
}

func newVMSuspendCommand(e *Env) *cobra.Command {
	cmd, _ := newLifecycleCommand(e, verb{
		use: "suspend NAME...", short: "Write VMs' memory to disk and end their processes", limit: saveLimit, fits: isRunning,
		long: "Write the memory of VMs to disk and end their processes. Resumed, their programs go on where they were,\n" +
			"with the same name, address and disks.",
		example: "banger vm suspend web\nbanger vm resume web", ask: askSuspend,
	})
	return cmd
}

func askSuspend(ctx context.Context, c *client.Client, name string, _ lifecycleOptions, sink client.Sink) (*bangerv1.VM, error) {
	return c.Suspend(ctx, &bangerv1.SuspendVMRequest{Vm: name}, sink)
}

func newVMResumeCommand(e *Env) *cobra.Command {
	cmd, _ := newLifecycleCommand(e, verb{
		use: "resume NAME...", short: "Let suspended VMs go on", limit: bootLimit, fits: isSuspended,
		ask: func(ctx context.Context, c *client.Client, name string, _ lifecycleOptions, sink client.Sink) (*bangerv1.VM, error) {
			return c.Start(ctx, &bangerv1.StartVMRequest{Vm: name, Resume: true}, sink)
		},
	})
	return cmd
}

func newVMStopCommand(e *Env) *cobra.Command {
	cmd, o := newLifecycleCommand(e, verb{
		use: "stop NAME...", short: "Stop VMs", limit: stopLimit, fits: isUp, ask: askStop,
		long: "Stop VMs: ask the guest to power off, insist, and in the end kill the machine.\n" +
			"Of a suspended VM the saved memory is dropped.",
	})
	cmd.Flags().BoolVarP(&o.force, "force", "f", false, "kill the machine at once")
	cmd.Flags().BoolVar(&o.suspend, "suspend", false, "suspend them instead: banger vm suspend")
	work := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if o.force && o.suspend {
			return fault.New(fault.Usage, "--force and --suspend do not go together").WithHint("a VM that is killed has no memory to keep")
		}
		return work(cmd, args)
	}
	return cmd
}

func newVMKillCommand(e *Env) *cobra.Command {
	cmd, o := newLifecycleCommand(e, verb{
		use: "kill NAME...", short: "Kill VMs at once, as by pulling the plug", limit: stopLimit, fits: isUp, ask: askStop,
	})
	o.force = true
	return cmd
}

func askStop(ctx context.Context, c *client.Client, name string, o lifecycleOptions, sink client.Sink) (*bangerv1.VM, error) {
	if o.suspend {
		return askSuspend(ctx, c, name, o, sink)
	}
	return c.Stop(ctx, &bangerv1.StopVMRequest{Vm: name, Force: o.force}, sink)
}

func newVMRestartCommand(e *Env) *cobra.Command {
	cmd, _ := newLifecycleCommand(e, verb{
		use: "restart NAME...", short: "Stop VMs and start them again", limit: bootLimit, fits: isUp,
		ask: func(ctx context.Context, c *client.Client, name string, _ lifecycleOptions, sink client.Sink) (*bangerv1.VM, error) {
			return c.Restart(ctx, &bangerv1.RestartVMRequest{Vm: name}, sink)
		},
	})
	return cmd
}

func newVMDeleteCommand(e *Env) *cobra.Command {
	cmd, o := newLifecycleCommand(e, verb{
		use: "delete NAME...", short: "Delete VMs and their disks", limit: stopLimit,
		long: "Delete VMs and their disks. On a terminal it asks first. VMs that run need --force.",
		ask: func(ctx context.Context, c *client.Client, name string, o lifecycleOptions, sink client.Sink) (*bangerv1.VM, error) {
			return nil, c.Delete(ctx, &bangerv1.DeleteVMRequest{Vm: name, Force: o.force}, sink)
		},
	})
	cmd.Aliases = []string{"rm"}
	cmd.Flags().BoolVarP(&o.force, "force", "f", false, "delete also VMs that run, and do not ask")
	cmd.Flags().BoolVarP(&o.yes, "yes", "y", false, "do not ask")
	work := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if err := e.confirmDelete(args, *o); err != nil {
			return err
		}
		return work(cmd, args)
	}
	return cmd
}

// confirmDelete asks a person at a terminal. Scripts are not asked.
func (e *Env) confirmDelete(names []string, o lifecycleOptions) error {
	if o.yes || o.force || !e.isAsked() {
		return nil
	}
	return e.confirm(fmt.Sprintf("Delete %s and the disks with all that is on them?", strings.Join(names, ", ")), "nothing was deleted")
}

// isAsked tells whether there is a person to ask.
func (e *Env) isAsked() bool { return isTerminal(e.Stdin) && isTerminal(e.Stderr) }

// confirm asks a person; anything but a yes is an Interrupted fault of that text.
func (e *Env) confirm(question, otherwise string) error {
	fmt.Fprint(e.Stderr, question+" [y/N] ")
	answer, err := bufio.NewReader(io.LimitReader(e.Stdin, 100)).ReadString('\n')
	if err != nil {
		answer = ""
	}
	switch strings.ToLower(strings.TrimSpace(answer)) {
	case "y", "yes":
		return nil
	}
	return fault.New(fault.Interrupted, "%s", otherwise)
}

func newLifecycleCommand(e *Env, v verb) (*cobra.Command, *lifecycleOptions) {
	o := &lifecycleOptions{}
	fits := v.fits
	if fits == nil {
		fits = isAny
	}
	cmd := &cobra.Command{
		Use: v.use, Short: v.short, Long: v.long, Example: v.example,
		Args: someNames, ValidArgsFunction: e.completeVMs(fits),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.names = args
			return e.within(cmd.Context(), v.limit, func(ctx context.Context) error { return runLifecycle(ctx, *o, v, e) })
		},
	}
	addOutputFlag(cmd, &o.output)
	return cmd, o
}

// runLifecycle asks for all VMs at once and prints those that got there, in the order named. The
// failures come back in that order as well.
func runLifecycle(ctx context.Context, o lifecycleOptions, v verb, e *Env) error {
	o.names = distinct(o.names)
	c, err := e.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	vms, errs := e.askEach(ctx, c, o, v)
	if err := e.printChanged(o, vms, errs); err != nil {
		return err
	}
	var failed severalErrors
	for i, err := range errs {
		if err != nil {
			failed = append(failed, about(o.names[i], len(o.names), explain(ctx, err)))
		}
	}
	if len(failed) == 0 {
		return nil
	}
	return failed
}

func (e *Env) askEach(ctx context.Context, c *client.Client, o lifecycleOptions, v verb) ([]*bangerv1.VM, []error) {
	d := e.newDisplay()
	defer d.close()
	vms, errs := make([]*bangerv1.VM, len(o.names)), make([]error, len(o.names))
	slots := make(chan struct{}, concurrency)
	var wg sync.WaitGroup
	for i, name := range o.names {
		label := name
		if len(o.names) == 1 {
			label = ""
		}
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			vms[i], errs[i] = v.ask(ctx, c, name, o, d.sink(label))
		})
	}
	wg.Wait()
	return vms, errs
}

func (e *Env) printChanged(o lifecycleOptions, vms []*bangerv1.VM, errs []error) error {
	changed, names := []any{}, ""
	for i, name := range o.names {
		switch {
		case errs[i] != nil:
			continue
		case vms[i] == nil:
			changed = append(changed, deletedView{name})
		default:
			changed = append(changed, viewVM(vms[i]))
			name = vms[i].GetName()
		}
		names += name + "\n"
	}
	return e.print(o.output, changed, func() string { return names })
}

// about says which VM a failure is about, when there are several and the text does not say it.
func about(name string, of int, err error) error {
	if of == 1 || strings.Contains(err.Error(), name) {
		return err
	}
	return fault.Wrap(fault.KindOf(err), err, "VM %s", name).WithHint("%s", fault.HintOf(err))
}

func distinct(names []string) []string {
	seen, out := map[string]bool{}, []string(nil)
	for _, n := range names {
		if !seen[n] {
			seen[n] = true
			out = append(out, n)
		}
	}
	return out
}

func isAny(string) bool           { return true }
func isRunning(state string) bool { return state == "running" }
func isStopped(state string) bool {
	return state == "stopped" || state == "failed" || state == "suspended"
}
func isSuspended(state string) bool { return state == "suspended" }

// isUp fits what can be stopped; of a suspended VM that is its memory.
func isUp(state string) bool { return state != "stopped" && state != "failed" && state != "deleting" }
