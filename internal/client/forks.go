package client

import (
	"context"

	bangerv1 "banger/api/banger/v1"
)

// Fork makes VMs of a running one. When ctx ends first, the daemon takes back what it made, and Fork returns when the
// source runs on.
func (c *Client) Fork(ctx context.Context, req *bangerv1.ForkVMRequest, sink Sink) (*bangerv1.Forked, error) {
	var done *bangerv1.Forked
	stream, err := c.VMs.ForkVM(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.ForkVMResponse) { done = pick(done, m.GetForked()) })
	}
	if ctx.Err() != nil {
		c.settle(ctx, req.GetVm())
	}
	return done, err
}

// Clone makes another VM of a stopped one. When ctx ends first, the daemon takes it back.
func (c *Client) Clone(ctx context.Context, req *bangerv1.CloneVMRequest, sink Sink) (*bangerv1.VM, error) {
	var vm *bangerv1.VM
	stream, err := c.VMs.CloneVM(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.CloneVMResponse) { vm = pick(vm, m.GetVm()) })
	}
	if ctx.Err() != nil && req.GetName() != "" {
		c.settle(ctx, req.GetName())
	}
	return vm, err
}
