package cli

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"time"

	"al.essio.dev/pkg/shellescape"
	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/system"
)

type sshOptions struct {
	name     string
	command  []string
	terminal bool
}

func newVMSSHCommand(e *Env) *cobra.Command {
	var o sshOptions
	cmd := &cobra.Command{
		Use: "ssh NAME [-- CMD...]", Short: "Open a shell in a VM over SSH, or run CMD there",
		Long: "Open a shell in a VM over SSH, or run CMD there and exit with its code. CMD of one word goes to the\n" +
			"guest's shell as it is; of several words, each arrives as it was given.",
		Example: "banger vm ssh web\nbanger vm ssh web -- uname -a\nbanger vm ssh web -- 'cd /srv && ls | wc -l'",
		Args:    nameAndCommand, ValidArgsFunction: e.completeOneVM(isRunning),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name, o.command = splitCommand(cmd, args)
			return runVMSSH(cmd.Context(), o, e)
		},
	}
	cmd.Flags().BoolVarP(&o.terminal, "tty", "t", false, "a terminal also for CMD")
	return cmd
}

func runVMSSH(ctx context.Context, o sshOptions, e *Env) error {
	ssh, err := findSSH()
	if err != nil {
		return err
	}
	var c *client.Client
	var endpoint *bangerv1.SSHEndpoint
	err = e.within(ctx, bootLimit, func(ctx context.Context) error {
		if c, err = e.connect(ctx); err != nil {
			return err
		}
		endpoint, err = e.awaitSSH(ctx, c, o.name)
		return err
	})
	if c != nil {
		defer c.Close()
	}
	if err != nil {
		return err
	}
	err = e.enter(ctx, ssh, endpoint, o)
	e.remindRunning(ctx, c, o.name)
	return err
}

func findSSH() (string, error) { return system.Find("ssh", "openssh-client") }

// sshPatience is how long SSH may be awaited before it is shown that something is awaited.
const sshPatience = 300 * time.Millisecond

// awaitSSH waits until the VM's SSH server answers. The wait is shown as a stage when it is one.
func (e *Env) awaitSSH(ctx context.Context, c *client.Client, name string) (*bangerv1.SSHEndpoint, error) {
	type answer struct {
		endpoint *bangerv1.SSHEndpoint
		err      error
	}
	answers := make(chan answer, 1)
	go func() {
		res, err := c.VMs.GetSSHEndpoint(ctx, &bangerv1.GetSSHEndpointRequest{Vm: name, Wait: true})
		answers <- answer{res.GetEndpoint(), err}
	}()
	select {
	case a := <-answers:
		return a.endpoint, a.err
	case <-time.After(sshPatience):
	}
	d := e.newDisplay()
	defer d.close()
	var a answer
	err := d.stage("", "ssh answers", func() error {
		a = <-answers // ends with ctx
		return a.err
	})
	return a.endpoint, err
}

// enter runs ssh in the foreground and returns its exit code as an error.
func (e *Env) enter(ctx context.Context, ssh string, endpoint *bangerv1.SSHEndpoint, o sshOptions) error {
	// ssh itself is told of signals, and ends the session in its own way.
	release := e.takeSignals(nil)
	defer release()
	code, err := system.Foreground(context.WithoutCancel(ctx), system.Command{
		Path: ssh, Args: sshArguments(endpoint, o, isTerminal(e.Stdin)), Stdin: e.Stdin, Stdout: e.Stdout,
	})
	if err != nil {
		return err
	}
	return silent(code)
}

// sshArguments reaches the VM with banger's own key and known hosts. The user's configuration is
// left out: a "Host *" in it could send the connection elsewhere.
func sshArguments(p *bangerv1.SSHEndpoint, o sshOptions, terminal bool) []string {
	args := []string{"-F", "none", "-p", strconv.Itoa(int(p.GetPort())), "-i", p.GetIdentityFile()}
	options := []string{
		"IdentitiesOnly=yes",
		"UserKnownHostsFile=" + quoteOption(p.GetKnownHostsFile()),
		"GlobalKnownHostsFile=none",
		"HostKeyAlias=" + p.GetHostKeyAlias(),
		"StrictHostKeyChecking=yes",
		"UpdateHostKeys=no",
		"PreferredAuthentications=publickey",
		"ConnectTimeout=20",
		"ServerAliveInterval=15", // a VM that is gone ends the session within a minute
		"ServerAliveCountMax=4",
		"LogLevel=ERROR",
	}
	for _, option := range options {
		args = append(args, "-o", option)
	}
	switch {
	case len(o.command) > 0 && o.terminal:
		args = append(args, "-tt") // twice: also when our own side is none, as with exec
	case !terminal:
		args = append(args, "-T")
	}
	args = append(args, "-l", p.GetUser(), "--", p.GetHost())
	if len(o.command) > 0 {
		args = append(args, shellLine(o.command))
	}
	return args
}

// quoteOption quotes a path for ssh's -o, which splits at spaces.
func quoteOption(path string) string {
	return `"` + strings.ReplaceAll(path, `"`, `\"`) + `"`
}

// shellLine makes one line for the guest's shell, which is all SSH can carry.
func shellLine(command []string) string {
	if len(command) == 1 {
		return command[0]
	}
	return shellescape.QuoteCommand(command)
}

// remindLimit bounds the question whether the VM still runs: nobody waits for a reminder.
const remindLimit = 2 * time.Second

// remindRunning says that the VM goes on, when its agent says so.
func (e *Env) remindRunning(ctx context.Context, c *client.Client, name string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), remindLimit)
	defer cancel()
	if _, err := c.VMs.PingVM(ctx, &bangerv1.PingVMRequest{Vm: name}); err != nil {
		return
	}
	e.notice(fmt.Sprintf("VM %s is still running; stop it with: banger vm stop %s", name, name))
}
