package cli

import (
	"context"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

type runOptions struct {
	name    string
	command []string
	remove  bool
	spec    specOptions
}

func newRunCommand(e *Env) *cobra.Command {
	var o runOptions
	cmd := &cobra.Command{
		Use: "run [NAME|IMAGE] [-- CMD...]", Short: "Create a VM and enter it",
		Long: "Create a VM and open a shell in it over SSH, or run CMD there and exit with its code.\n" +
			"The VM stays when you leave, unless --rm says otherwise. Without a name one is made up.\n" +
			"A reference to a container image, which has a slash or a colon in it, is fetched from its registry and imported\n" +
			"first, unless it was before; --image takes one as well.",
		Example: "banger run\nbanger run web\nbanger run --rm -- uname -a\nbanger run docker.io/library/alpine\n" +
			"banger run box --image alpine:3.20",
		Args: optionalNameAndCommand, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name, o.command = splitCommand(cmd, args)
			return runRun(cmd.Context(), o, e)
		},
	}
	o.spec.addFlags(cmd, e)
	cmd.Flags().BoolVar(&o.remove, "rm", false, "delete the VM when you leave")
	return cmd
}

// splitCommand parts the name from what follows it; a "--" may stand between.
func splitCommand(cmd *cobra.Command, args []string) (name string, command []string) {
	if cmd.ArgsLenAtDash() == 0 || len(args) == 0 {
		return "", args
	}
	return args[0], args[1:]
}

func runRun(ctx context.Context, o runOptions, e *Env) error {
	if isReference(o.name) && o.spec.image == "" {
		o.name, o.spec.image = "", o.name
	}
	spec, err := o.spec.spec(o.name)
	if err != nil {
		return err
	}
	spec.Ephemeral = o.remove
	ssh, err := findSSH() // before anything is made
	if err != nil {
		return err
	}
	var c *client.Client
	var created *bangerv1.VM
	var endpoint *bangerv1.SSHEndpoint
	err = e.within(ctx, bootLimit, func(ctx context.Context) error {
		if c, err = e.connect(ctx); err != nil {
			return err
		}
		created, err = e.create(ctx, c, &bangerv1.CreateVMRequest{Spec: spec})
		if err != nil {
			return e.whenTaken(ctx, c, o.name, err)
		}
		endpoint, err = e.awaitSSH(ctx, c, created.GetName())
		return err
	})
	if c != nil {
		defer c.Close()
	}
	if created == nil {
		return err
	}
	if err == nil {
		e.greet(created.GetName(), o)
		err = e.enter(ctx, ssh, endpoint, sshOptions{command: o.command})
	}
	if o.remove {
		return both(err, e.removeEphemeral(ctx, c, created.GetName()))
	}
	e.remindRunning(ctx, c, created.GetName())
	return err
}

// both keeps the first failure's exit code and prints both.
func both(first, second error) error {
	switch {
	case first == nil:
		return second
	case second == nil:
		return first
	}
	return severalErrors{first, second}
}

// greet tells the made-up name to who is about to see a shell.
func (e *Env) greet(name string, o runOptions) {
	if o.name == "" && len(o.command) == 0 {
		e.notice("this is VM " + name)
	}
}

// whenTaken gives the conflict over a taken name the hint that leads into the VM that has it.
func (e *Env) whenTaken(ctx context.Context, c *client.Client, name string, err error) error {
	if fault.KindOf(err) != fault.Conflict || name == "" {
		return err
	}
	res, lookup := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Vm: name})
	if lookup != nil {
		return err // the conflict was over something else
	}
	f := fault.New(fault.Conflict, "VM %s exists already and is %s", name, res.GetVm().GetState())
	switch res.GetVm().GetState() {
	case "suspended":
		return f.WithHint("enter it with: banger vm resume %s && banger vm ssh %s", name, name)
	case "stopped", "failed":
		return f.WithHint("enter it with: banger vm start %s && banger vm ssh %s", name, name)
	}
	return f.WithHint("enter it with: banger vm ssh %s", name)
}

// removeEphemeral deletes a VM that was made with --rm. It may be gone already: it is deleted
// when its guest powers off.
func (e *Env) removeEphemeral(ctx context.Context, c *client.Client, name string) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopLimit)
	defer cancel()
	err := c.Delete(ctx, &bangerv1.DeleteVMRequest{Vm: name, Force: true}, nil)
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}
