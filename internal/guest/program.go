package guest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/fault"
)

// maxComplaint bounds what is kept of a program's words on its standard error, in bytes.
const maxComplaint = 1 << 10

// ExitError is the end of a program that did not succeed.
type ExitError struct {
	Code   int            // 128+Signal after a signal
	Signal syscall.Signal // 0 when it exited by itself
	Why    string         // it could not be started; empty otherwise
}

func (e *ExitError) Error() string {
	switch {
	case e.Why != "":
		return "could not be started: " + e.Why
	case e.Signal != 0:
		return fmt.Sprintf("was ended by signal %d", e.Signal)
	}
	return fmt.Sprintf("failed with exit code %d", e.Code)
}

// Run runs a program in the guest, as root and without input, and writes what it writes. It returns nil only when the
// program succeeded and all its output was written. Any other end of the program is an *ExitError, one that the guest does not
// tell is io.ErrUnexpectedEOF or an error of the channel. A failed write and the end of ctx end the program.
func Run(ctx context.Context, agent agentv1connect.AgentServiceClient, stdout, stderr io.Writer, argv ...string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // a program that goes on talking after it was told of its end is not listened to
	stream, err := agent.Exec(ctx)
	if err != nil {
		return err
	}
	defer stream.CloseResponse()
	start := &agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{Argv: argv}}}
	if err := stream.Send(start); err != nil {
		return err
	}
	if err := stream.CloseRequest(); err != nil {
		return err
	}
	for {
		r, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return io.ErrUnexpectedEOF
		}
		if err != nil {
			return err
		}
		if err := pass(r, stdout, stderr); err != nil {
			return err
		}
		exit := r.GetExited()
		switch {
		case exit == nil:
		case exit.GetCode() == 0 && exit.GetError() == "":
			return nil
		default:
			return &ExitError{Code: int(exit.GetCode()), Signal: syscall.Signal(exit.GetSignal()), Why: strings.ToValidUTF8(exit.GetError(), "?")}
		}
	}
}

// pass writes the output that r has.
func pass(r *agentv1.ExecResponse, stdout, stderr io.Writer) error {
	if p := r.GetStdout(); len(p) > 0 {
		if _, err := stdout.Write(p); err != nil {
			return err
		}
	}
	if p := r.GetStderr(); len(p) > 0 {
		if _, err := stderr.Write(p); err != nil {
			return err
		}
	}
	return nil
}

// Succeed runs a program in the guest, as root and without input. Any end of it but success is a Precondition fault
// with what it said on its standard error.
func (c *Client) Succeed(ctx context.Context, argv ...string) error {
	said := &complaint{}
	err := Run(ctx, c, io.Discard, said, argv...)
	if exit := new(ExitError); errors.As(err, &exit) {
		why := strings.Join(strings.Fields(strings.ToValidUTF8(exit.Why+" "+said.String(), "?")), " ")
		return fault.New(fault.Precondition, "%s failed in the guest with status %d: %s", argv[0], exit.Code, why)
	}
	return err
}

// complaint keeps the beginning of what is said.
type complaint struct{ strings.Builder }

func (c *complaint) Write(p []byte) (int, error) {
	c.Builder.Write(p[:min(len(p), maxComplaint-c.Len())])
	return len(p), nil
}
