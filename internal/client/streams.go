package client

import (
	"context"
	"time"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
)

// rollbackTimeout bounds the wait for the daemon to take back what was interrupted.
const rollbackTimeout = 60 * time.Second

// Sink is told how a long operation goes. May be nil.
type Sink = func(*bangerv1.Progress)

// Create makes a VM and, unless the request says otherwise, starts it. When ctx ends first, the daemon
// takes back what it made, and Create returns when it has.
func (c *Client) Create(ctx context.Context, req *bangerv1.CreateVMRequest, sink Sink) (*bangerv1.VM, error) {
	var vm *bangerv1.VM
	stream, err := c.VMs.CreateVM(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.CreateVMResponse) { vm = pick(vm, m.GetVm()) })
	}
	if ctx.Err() != nil {
		c.settle(ctx, req.GetSpec().GetName())
	}
	return vm, err
}

// Start starts a VM. When ctx ends first, the daemon rolls the start back, and Start returns when it has.
func (c *Client) Start(ctx context.Context, req *bangerv1.StartVMRequest, sink Sink) (*bangerv1.VM, error) {
	var vm *bangerv1.VM
	stream, err := c.VMs.StartVM(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.StartVMResponse) { vm = pick(vm, m.GetVm()) })
	}
	if ctx.Err() != nil {
		c.settle(ctx, req.GetVm())
	}
	return vm, err
}

// Suspend writes a VM's memory to disk and ends its process. When ctx ends first, the guest runs on, and Suspend
// returns when it does.
func (c *Client) Suspend(ctx context.Context, req *bangerv1.SuspendVMRequest, sink Sink) (*bangerv1.VM, error) {
	var vm *bangerv1.VM
	stream, err := c.VMs.SuspendVM(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.SuspendVMResponse) { vm = pick(vm, m.GetVm()) })
	}
	if ctx.Err() != nil {
		c.settle(ctx, req.GetVm())
	}
	return vm, err
}

// Stop stops a VM.
func (c *Client) Stop(ctx context.Context, req *bangerv1.StopVMRequest, sink Sink) (*bangerv1.VM, error) {
	var vm *bangerv1.VM
	stream, err := c.VMs.StopVM(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.StopVMResponse) { vm = pick(vm, m.GetVm()) })
	}
	return vm, err
}

// Restart stops a VM and starts it again. When ctx ends first, the daemon rolls the start back,
// and Restart returns when it has.
func (c *Client) Restart(ctx context.Context, req *bangerv1.RestartVMRequest, sink Sink) (*bangerv1.VM, error) {
	var vm *bangerv1.VM
	stream, err := c.VMs.RestartVM(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.RestartVMResponse) { vm = pick(vm, m.GetVm()) })
	}
	if ctx.Err() != nil {
		c.settle(ctx, req.GetVm())
	}
	return vm, err
}

// Delete deletes a VM.
func (c *Client) Delete(ctx context.Context, req *bangerv1.DeleteVMRequest, sink Sink) error {
	stream, err := c.VMs.DeleteVM(ctx, req)
	if err != nil {
		return err
	}
	return drain(stream, sink, func(*bangerv1.DeleteVMResponse) {})
}

// Setup makes the default kernel and image, or finds them in place.
func (c *Client) Setup(ctx context.Context, req *bangerv1.SetupRequest, sink Sink) (*bangerv1.SetupResult, error) {
	var result *bangerv1.SetupResult
	stream, err := c.Images.Setup(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.SetupResponse) { result = pick(result, m.GetResult()) })
	}
	return result, err
}

func pick[T any](old, new *T) *T {
	if new != nil {
		return new
	}
	return old
}

type progressed[T any] interface {
	*T
	GetProgress() *bangerv1.Progress
}

// drain reads a stream to its end: progress goes to sink, and each message to take.
func drain[T any, P progressed[T]](stream *connect.ServerStreamForClient[T], sink Sink, take func(P)) error {
	defer stream.Close()
	for stream.Receive() {
		m := P(stream.Msg())
		if p := m.GetProgress(); p != nil && sink != nil {
			sink(p)
		}
		take(m)
	}
	return stream.Err()
}

// settle waits until the daemon has finished taking back what ctx's end interrupted, so that the
// user sees the host as it will be. It gives up with the daemon, or after rollbackTimeout.
func (c *Client) settle(ctx context.Context, ref string) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rollbackTimeout)
	defer cancel()
	for ref != "" {
		res, err := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Vm: ref})
		if err != nil || !passing(res.GetVm().GetState()) {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(50 * time.Millisecond):
		}
	}
}

// passing tells whether someone works on a VM in this state.
func passing(state string) bool {
	switch state {
	case "starting", "stopping", "deleting", "suspending", "resuming", "paused", "reverting":
		return true
	}
	return false
}
