package client

import (
	"context"
	"net"
	"sync"
	"time"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/fault"
	"banger/internal/wire/wirefault"
)

// aliveTimeout bounds the look whether anybody still listens.
const aliveTimeout = time.Second

// interceptor gives every unary call a deadline and makes faults of errors.
type interceptor struct{ socket string }

func (interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (connect.AnyResponse, error) {
		if _, ok := ctx.Deadline(); !ok {
			limit := unaryTimeout
			if req.Spec().Procedure == bangerv1connect.VMServiceGetSSHEndpointProcedure {
				limit = endpointTimeout
			}
			var cancel context.CancelFunc
			ctx, cancel = context.WithTimeout(ctx, limit)
			defer cancel()
		}
		res, err := next(ctx, req)
		if err != nil {
			return nil, wirefault.FromConnect(err)
		}
		return res, nil
	}
}

func (i interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return func(ctx context.Context, spec connect.Spec) connect.StreamingClientConn {
		return &faultConn{StreamingClientConn: next(ctx, spec), ctx: ctx, procedure: spec.Procedure, socket: i.socket}
	}
}

func (interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return next
}

// faultConn makes faults of a stream's errors.
type faultConn struct {
	connect.StreamingClientConn

	ctx       context.Context // the call's
	procedure string
	socket    string

	mu sync.Mutex // a stream is sent to and read from at the same time
	vm string     // the VM that the request named
}

func (c *faultConn) Send(m any) error {
	c.remember(m)
	return c.explain(c.StreamingClientConn.Send(m))
}

func (c *faultConn) Receive(m any) error { return c.explain(c.StreamingClientConn.Receive(m)) }

func (c *faultConn) remember(m any) {
	name := ""
	switch m := m.(type) {
	case interface{ GetSpec() *bangerv1.VMSpec }:
		name = m.GetSpec().GetName()
	case interface{ GetVm() string }:
		name = m.GetVm()
	}
	if name == "" {
		return
	}
	c.mu.Lock()
	c.vm = name
	c.mu.Unlock()
}

func (c *faultConn) explain(err error) error {
	if err == nil || c.ctx.Err() != nil || !wirefault.Broke(err) {
		return wirefault.FromConnect(err)
	}
	c.mu.Lock()
	name := c.vm
	c.mu.Unlock()
	return lost(c.procedure, name, c.socket)
}

// lost is the fault of a stream whose daemon was lost in the middle of its work: what it was at, what becomes
// of the VM, and what to do.
func lost(procedure, name, socket string) error {
	who := "the daemon ended"
	if listens(socket) {
		who = "the connection to the daemon broke"
	}
	const next = "the next command starts the daemon again, and it "
	type story struct{ while, hint string }
	stories := map[string]story{
		bangerv1connect.VMServiceCreateVMProcedure: {"it was creating VM " + name, next + "takes back what was made; then try again"},
		bangerv1connect.VMServiceStartVMProcedure:  {"it was starting VM " + name, next + "takes back the start; then try again: banger vm start " + name},
		bangerv1connect.VMServiceStopVMProcedure:   {"it was stopping VM " + name, next + "finishes a stop that had begun; see: banger vm show " + name},
		bangerv1connect.VMServiceRestartVMProcedure: {
			"it was restarting VM " + name, next + "finishes the stop or takes back the start; see: banger vm show " + name,
		},
		bangerv1connect.VMServiceDeleteVMProcedure: {"it was deleting VM " + name, next + "finishes a delete that had begun; see: banger vm list"},
		bangerv1connect.VMServiceExecVMProcedure: {
			"a program ran in VM " + name, "the VM runs on, and the program was hung up on; the next command starts the daemon again",
		},
		bangerv1connect.VMServiceReadLogProcedure: {
			"it was sending a log of VM " + name, "the VM is as it was; the next command starts the daemon again",
		},
		bangerv1connect.VMServiceSuspendVMProcedure: {
			"it was suspending VM " + name, next + "finishes the suspend, or the VM runs on; see: banger vm show " + name,
		},
		bangerv1connect.VMServiceForkVMProcedure: {
			"it was forking VM " + name, "VM " + name + " runs on; " + next + "takes back the forks that do not run yet; see: banger vm list",
		},
		bangerv1connect.VMServiceCloneVMProcedure: {
			"it was cloning VM " + name, "VM " + name + " is as it was; " + next + "takes back a clone that is not whole; see: banger vm list",
		},
		bangerv1connect.SnapshotServiceCreateSnapshotProcedure: {
			"it was making a snapshot of VM " + name,
			"VM " + name + " is as it was; " + next + "takes back a snapshot that is not whole; see: banger vm snapshot list " + name,
		},
		bangerv1connect.SnapshotServiceRestoreSnapshotProcedure: {
			"it was putting back VM " + name, next + "finishes that when it had begun; see: banger vm show " + name,
		},
		bangerv1connect.TemplateServiceWarmTemplateProcedure: {"it was making a template", next + "takes back what was made; then try again"},
		bangerv1connect.ImageServiceImportImageProcedure:     {"it was importing an image", next + "removes what was made; then try again"},
		bangerv1connect.ImageServiceImportKernelProcedure:    {"it was importing a kernel", next + "removes what was made; then try again"},
		bangerv1connect.ImageServiceSetupProcedure:           {"it was setting up", "what was finished stays; go on with: banger setup"},
	}
	s, ok := stories[procedure]
	if !ok {
		s = story{"it was answering", "banger daemon logs may tell why; the next command starts the daemon again"}
	}
	return fault.New(fault.Precondition, "%s while %s", who, s.while).WithHint("%s", s.hint)
}

// listens tells whether a daemon, this or another, can be reached.
func listens(socket string) bool {
	conn, err := net.DialTimeout("unix", socket, aliveTimeout)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}
