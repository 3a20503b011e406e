package server

import (
	"context"
	"errors"
	"io"

	"connectrpc.com/connect"

	agentv1 "banger/api/agent/v1"
	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
	"banger/internal/wire/wirefault"
)

type execStream = connect.BidiStream[bangerv1.ExecVMRequest, bangerv1.ExecVMResponse]

// ExecVM passes messages between the client and the agent, one at a time in each direction: a side
// that does not read holds up the other by flow control, and nothing piles up here.
func (s vmService) ExecVM(ctx context.Context, client *execStream) error {
	first, err := client.Receive()
	if err != nil {
		if errors.Is(err, io.EOF) {
			return fault.New(fault.Usage, "the first request must name the VM")
		}
		return err
	}
	ref := first.GetVm()
	if ref == "" {
		return fault.New(fault.Usage, "the first request must name the VM")
	}
	agent, err := s.Engine.Agent(ctx, ref)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	program, err := agent.Exec(ctx)
	if err != nil {
		return agentFault(err, ref)
	}
	// The end of the context alone does not reach the agent: while the request is open nothing resets the HTTP/2
	// stream, the program in the guest runs on, and Receive waits for it.
	context.AfterFunc(ctx, func() {
		_ = program.CloseRequest()
		_ = program.CloseResponse()
	})
	// It ends with the handler: Connect closes the request then.
	go func() {
		if err := forwardInput(client, program); err != nil {
			cancel()
		}
	}()
	return forwardOutput(client, program, ref)
}

type agentStream = connect.BidiStreamForClientSimple[agentv1.ExecRequest, agentv1.ExecResponse]

func forwardInput(client *execStream, program *agentStream) error {
	for {
		req, err := client.Receive()
		if errors.Is(err, io.EOF) {
			return program.CloseRequest()
		}
		if err != nil {
			return err
		}
		if req.GetExec() == nil {
			continue // nothing we know of: a newer client's
		}
		if err := program.Send(req.GetExec()); err != nil {
			if errors.Is(err, io.EOF) { // the agent has ended the stream: forwardOutput hears why
				return nil
			}
			return err
		}
	}
}

func forwardOutput(client *execStream, program *agentStream, ref string) error {
	for {
		res, err := program.Receive()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return agentFault(err, ref)
		}
		if err := client.Send(&bangerv1.ExecVMResponse{Exec: res}); err != nil {
			return err
		}
	}
}

// agentFault makes a fault of what the guest channel or the agent said.
func agentFault(err error, ref string) error {
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	code := connect.CodeOf(err)
	switch {
	case code == connect.CodeCanceled:
		return fault.New(fault.Interrupted, "interrupted")
	case code == connect.CodeDeadlineExceeded:
		return fault.New(fault.Timeout, "the agent of VM %s does not answer", ref).
			WithHint("banger vm logs %s shows the guest's console", ref)
	case code == connect.CodeUnavailable, code == connect.CodeUnknown, wirefault.Broke(err):
		return fault.Wrap(fault.Conflict, err, "the connection to the agent of VM %s broke", ref).
			WithHint("banger vm show %s tells whether it still runs", ref)
	case code == connect.CodeInvalidArgument:
		return fault.Wrap(fault.Usage, err, "the agent of VM %s refused", ref)
	case code == connect.CodeNotFound:
		return fault.Wrap(fault.NotFound, err, "the agent of VM %s", ref)
	}
	return fault.Wrap(fault.Unexpected, err, "the agent of VM %s", ref)
}
