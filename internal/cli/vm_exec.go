package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	agentv1 "banger/api/agent/v1"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

type execOptions struct {
	name        string
	command     []string
	interactive bool
	terminal    bool
	user        string
	workDir     string
	env         []string
}

func newVMExecCommand(e *Env) *cobra.Command {
	var o execOptions
	cmd := &cobra.Command{
		Use: "exec NAME [-- CMD...]", Short: "Run a program in a VM over the guest channel",
		Long: "Run a program in a VM over the guest channel, which needs neither network nor SSH, and exit with its\n" +
			"code. Without CMD it is the user's login shell.",
		Example: "banger vm exec web -- systemctl status\nbanger vm exec -t web\necho hello | banger vm exec -i web -- tee /tmp/greeting",
		Args:    nameAndCommand, ValidArgsFunction: e.completeOneVM(isRunning),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name, o.command = splitCommand(cmd, args)
			return runVMExec(cmd.Context(), o, e)
		},
	}
	f := cmd.Flags()
	f.BoolVarP(&o.interactive, "interactive", "i", false, "send our standard input to the program")
	f.BoolVarP(&o.terminal, "tty", "t", false, "give the program a terminal (and our standard input)")
	f.StringVarP(&o.user, "user", "u", "", "user name or number (default: root)")
	f.StringVarP(&o.workDir, "workdir", "w", "", "working directory (default: the user's home)")
	f.StringArrayVarP(&o.env, "env", "e", nil, "set a variable, NAME=value (may be repeated)")
	return cmd
}

func runVMExec(ctx context.Context, o execOptions, e *Env) error {
	if err := checkEnvironment(o.env); err != nil {
		return err
	}
	if len(o.command) == 0 && isTerminal(e.Stdin) {
		o.terminal = true // a login shell for a person
	}
	var c *client.Client
	err := e.within(ctx, quickLimit, func(ctx context.Context) (err error) {
		c, err = e.connect(ctx)
		return err
	})
	if err != nil {
		return err
	}
	defer c.Close()
	cancel := func() {}
	if e.timeout > 0 {
		ctx, cancel = e.withTimeout(ctx, e.timeout)
	}
	defer cancel()
	return explain(ctx, e.exec(ctx, c, o))
}

func checkEnvironment(list []string) error {
	for _, v := range list {
		if name, _, ok := strings.Cut(v, "="); !ok || name == "" {
			return fault.New(fault.Usage, "--env %q is no variable", v).WithHint("write it NAME=value")
		}
	}
	return nil
}

type execStream = connect.BidiStreamForClientSimple[bangerv1.ExecVMRequest, bangerv1.ExecVMResponse]

// exec runs the program and returns its exit code as an error.
func (e *Env) exec(ctx context.Context, c *client.Client, o execOptions) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // ends what sends, whichever way we leave
	stream, err := c.VMs.ExecVM(ctx)
	if err != nil {
		return err
	}
	restore, size, err := e.terminalFor(o)
	if err != nil {
		return err
	}
	defer restore()
	inputs := make(chan *agentv1.ExecRequest, 16)
	release := e.forwardSignals(ctx, cancel, o, inputs)
	defer release()
	go sendExec(ctx, stream, o, size, inputs)
	if o.interactive || o.terminal {
		go sendInput(ctx, e.Stdin, inputs)
	}
	return e.receiveExec(stream, o)
}

// terminalFor puts our terminal in raw mode when the program gets one. Its size is nil without.
func (e *Env) terminalFor(o execOptions) (restore func(), size *agentv1.TerminalSize, err error) {
	if !o.terminal {
		return func() {}, nil, nil
	}
	f, ok := e.Stdin.(*os.File)
	if !ok || !isTerminal(f) {
		return func() {}, &agentv1.TerminalSize{Rows: 24, Columns: 80}, nil
	}
	state, err := term.MakeRaw(int(f.Fd()))
	if err != nil {
		return nil, nil, fault.Wrap(fault.Precondition, err, "cannot put the terminal in raw mode")
	}
	return func() { _ = term.Restore(int(f.Fd()), state) }, terminalSize(f), nil
}

func terminalSize(f *os.File) *agentv1.TerminalSize {
	columns, rows, err := term.GetSize(int(f.Fd()))
	if err != nil {
		columns, rows = 80, 24
	}
	return &agentv1.TerminalSize{Rows: uint32(rows), Columns: uint32(columns)}
}

// insistence is the number of interrupts after which the guest is not waited for any longer.
const insistence = 3

// forwardSignals passes interrupts on to the program and, with a terminal, changes of its size.
func (e *Env) forwardSignals(ctx context.Context, cancel func(), o execOptions, to chan<- *agentv1.ExecRequest) (release func()) {
	count := 0
	releaseInterrupts := e.takeSignals(func(s os.Signal) {
		if count++; count >= insistence {
			cancel()
		}
		number, ok := s.(syscall.Signal)
		if ok {
			offer(ctx, to, &agentv1.ExecRequest{Input: &agentv1.ExecRequest_Signal{Signal: int32(number)}})
		}
	})
	f, ok := e.Stdin.(*os.File)
	if !o.terminal || !ok || !isTerminal(f) {
		return releaseInterrupts
	}
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-resized:
				offer(ctx, to, &agentv1.ExecRequest{Input: &agentv1.ExecRequest_Resize{Resize: terminalSize(f)}})
			}
		}
	}()
	return func() {
		signal.Stop(resized)
		releaseInterrupts()
	}
}

// offer hands a request to the sender, unless the end comes first.
func offer(ctx context.Context, to chan<- *agentv1.ExecRequest, r *agentv1.ExecRequest) {
	select {
	case to <- r:
	case <-ctx.Done():
	}
}

// sendExec is the only sender on the stream. A failure to send shows at the receiving side, with its reason.
// At the end it closes our side: while that is open, the end of ctx alone does not end the stream.
func sendExec(ctx context.Context, stream *execStream, o execOptions, size *agentv1.TerminalSize, inputs <-chan *agentv1.ExecRequest) {
	defer func() { _ = stream.CloseRequest() }()
	start := &agentv1.ExecStart{
		Argv: o.command, Env: o.env, Cwd: o.workDir, User: o.user, Terminal: size, Stdin: o.interactive || o.terminal,
	}
	first := []*bangerv1.ExecVMRequest{
		{Input: &bangerv1.ExecVMRequest_Vm{Vm: o.name}},
		wrapExec(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: start}}),
	}
	for _, r := range first {
		if stream.Send(r) != nil {
			return
		}
	}
	for {
		select {
		case <-ctx.Done():
			return
		case r := <-inputs:
			if stream.Send(wrapExec(r)) != nil {
				return
			}
		}
	}
}

func wrapExec(r *agentv1.ExecRequest) *bangerv1.ExecVMRequest {
	return &bangerv1.ExecVMRequest{Input: &bangerv1.ExecVMRequest_Exec{Exec: r}}
}

// sendInput reads our standard input until its end. A read cannot be interrupted: the goroutine
// may outlive the program, until the process ends.
func sendInput(ctx context.Context, from io.Reader, to chan<- *agentv1.ExecRequest) {
	for ctx.Err() == nil {
		buffer := make([]byte, 32<<10) // owned by the request from here on
		n, err := from.Read(buffer)
		if n > 0 {
			offer(ctx, to, &agentv1.ExecRequest{Input: &agentv1.ExecRequest_Stdin{Stdin: buffer[:n]}})
		}
		if err != nil {
			offer(ctx, to, &agentv1.ExecRequest{Input: &agentv1.ExecRequest_StdinEof{StdinEof: true}})
			return
		}
	}
}

func (e *Env) receiveExec(stream *execStream, o execOptions) error {
	for {
		message, err := stream.Receive()
		switch {
		case errors.Is(err, io.EOF):
			return fault.New(fault.Unexpected, "VM %s ended the connection before the program did", o.name).
				WithHint("see whether it still runs: banger vm show %s", o.name)
		case err != nil:
			return err
		}
		switch out := message.GetExec().GetOutput().(type) {
		case *agentv1.ExecResponse_Stdout:
			_, err = e.Stdout.Write(out.Stdout)
		case *agentv1.ExecResponse_Stderr:
			_, err = e.Stderr.Write(out.Stderr)
		case *agentv1.ExecResponse_Exited:
			if reason := out.Exited.GetError(); reason != "" {
				text := fmt.Sprintf("VM %s cannot run the program: %s", o.name, fault.Printable(reason))
				return &exitError{code: int(out.Exited.GetCode()), text: text}
			}
			return silent(int(out.Exited.GetCode()))
		}
		if err != nil {
			return err
		}
	}
}
