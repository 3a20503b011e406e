package client

import (
	"context"

	bangerv1 "banger/api/banger/v1"
)

// CreateSnapshot copies a VM. When ctx ends first there is no snapshot, and CreateSnapshot returns when the VM is as
// before.
func (c *Client) CreateSnapshot(ctx context.Context, req *bangerv1.CreateSnapshotRequest, sink Sink) (*bangerv1.Snapshot, error) {
	var made *bangerv1.Snapshot
	stream, err := c.Snapshots.CreateSnapshot(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.CreateSnapshotResponse) { made = pick(made, m.GetSnapshot()) })
	}
	if ctx.Err() != nil {
		c.settle(ctx, req.GetVm())
	}
	return made, err
}

// RestoreSnapshot puts a VM back to a snapshot.
func (c *Client) RestoreSnapshot(ctx context.Context, req *bangerv1.RestoreSnapshotRequest, sink Sink) (*bangerv1.VM, error) {
	var vm *bangerv1.VM
	stream, err := c.Snapshots.RestoreSnapshot(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.RestoreSnapshotResponse) { vm = pick(vm, m.GetVm()) })
	}
	if ctx.Err() != nil {
		c.settle(ctx, req.GetVm())
	}
	return vm, err
}
