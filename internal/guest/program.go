package guest

import (
	"context"
	"strings"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
)

// maxComplaint bounds what is kept of a program's words on its standard error, in bytes.
const maxComplaint = 1 << 10

// Succeed runs a program in the guest, as root and without input. Any end of it but success is a Precondition fault
// with what it said on its standard error.
func (c *Client) Succeed(ctx context.Context, argv ...string) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel() // a program that goes on talking after it was told of its end is not listened to
	stream, err := c.Exec(ctx)
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
	var said strings.Builder
	for {
		r, err := stream.Receive()
		if err != nil {
			return err
		}
		if text := r.GetStderr(); said.Len() < maxComplaint {
			said.Write(text[:min(len(text), maxComplaint-said.Len())])
		}
		exit := r.GetExited()
		switch {
		case exit == nil:
		case exit.GetCode() == 0 && exit.GetError() == "":
			return nil
		default:
			why := strings.Join(strings.Fields(strings.ToValidUTF8(exit.GetError()+" "+said.String(), "?")), " ")
			return fault.New(fault.Precondition, "%s failed in the guest with status %d: %s", argv[0], exit.GetCode(), why)
		}
	}
}
