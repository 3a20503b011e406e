package server

import (
	"context"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/engine"
	"banger/internal/fault"
	"banger/internal/progress"
	"banger/internal/snapshot"
	"banger/internal/vm"
	"banger/internal/wire"
)

// Snapshots is what the handlers need of the engine for snapshots.
type Snapshots interface {
	CreateSnapshot(ctx context.Context, ref string, w engine.SnapshotOptions, sink progress.Sink) (snapshot.Snapshot, error)
	Snapshots(ctx context.Context, ref string) ([]snapshot.Snapshot, error)
	Snapshot(ctx context.Context, ref, tag string) (snapshot.Snapshot, error)
	RestoreSnapshot(ctx context.Context, ref, tag string, w engine.RestoreOptions, sink progress.Sink) (vm.VM, error)
	DeleteSnapshot(ctx context.Context, ref, tag string) error
}

type snapshotService struct{ *service }

// both wants a VM and a tag.
func both(ref, tag string) error {
	if tag == "" {
		return fault.New(fault.Usage, "the request names no snapshot")
	}
	return named(ref)
}

// CreateSnapshot is given up when the client goes away; the VM runs on.
func (s snapshotService) CreateSnapshot(ctx context.Context, req *bangerv1.CreateSnapshotRequest, out *connect.ServerStream[bangerv1.CreateSnapshotResponse]) error {
	if err := named(req.GetVm()); err != nil {
		return err
	}
	var made snapshot.Snapshot
	err := withProgress(ctx, s.Logger,
		func(e progress.Event) error {
			return out.Send(&bangerv1.CreateSnapshotResponse{Event: &bangerv1.CreateSnapshotResponse_Progress{Progress: wire.Progress(e)}})
		},
		func(ctx context.Context, sink progress.Sink) (err error) {
			w := engine.SnapshotOptions{Tag: req.GetTag(), Note: req.GetNote(), Labels: req.GetLabels()}
			made, err = s.Options.Snapshots.CreateSnapshot(ctx, req.GetVm(), w, sink)
			return err
		})
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.CreateSnapshotResponse{Event: &bangerv1.CreateSnapshotResponse_Snapshot{Snapshot: wire.Snapshot(made)}})
}

// ListSnapshots waits for nobody.
func (s snapshotService) ListSnapshots(ctx context.Context, req *bangerv1.ListSnapshotsRequest) (*bangerv1.ListSnapshotsResponse, error) {
	if err := named(req.GetVm()); err != nil {
		return nil, err
	}
	list, err := s.Options.Snapshots.Snapshots(ctx, req.GetVm())
	if err != nil {
		return nil, err
	}
	res := &bangerv1.ListSnapshotsResponse{}
	for _, one := range list {
		res.Snapshots = append(res.Snapshots, wire.Snapshot(one))
	}
	return res, nil
}

func (s snapshotService) GetSnapshot(ctx context.Context, req *bangerv1.GetSnapshotRequest) (*bangerv1.GetSnapshotResponse, error) {
	if err := both(req.GetVm(), req.GetTag()); err != nil {
		return nil, err
	}
	one, err := s.Options.Snapshots.Snapshot(ctx, req.GetVm(), req.GetTag())
	if err != nil {
		return nil, err
	}
	return &bangerv1.GetSnapshotResponse{Snapshot: wire.Snapshot(one)}, nil
}

// RestoreSnapshot leaves the VM as it is when the client goes away before its disks are replaced.
func (s snapshotService) RestoreSnapshot(ctx context.Context, req *bangerv1.RestoreSnapshotRequest, out *connect.ServerStream[bangerv1.RestoreSnapshotResponse]) error {
	if err := both(req.GetVm(), req.GetTag()); err != nil {
		return err
	}
	v, err := s.change(ctx, req.GetVm(),
		func(p *bangerv1.Progress) error {
			return out.Send(&bangerv1.RestoreSnapshotResponse{Event: &bangerv1.RestoreSnapshotResponse_Progress{Progress: p}})
		},
		func(ctx context.Context, sink progress.Sink) (vm.VM, error) {
			w := engine.RestoreOptions{DisksOnly: req.GetDisksOnly(), Running: req.GetRunning()}
			return s.Options.Snapshots.RestoreSnapshot(ctx, req.GetVm(), req.GetTag(), w, sink)
		})
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.RestoreSnapshotResponse{Event: &bangerv1.RestoreSnapshotResponse_Vm{Vm: v}})
}

func (s snapshotService) DeleteSnapshot(ctx context.Context, req *bangerv1.DeleteSnapshotRequest) (*bangerv1.DeleteSnapshotResponse, error) {
	if err := both(req.GetVm(), req.GetTag()); err != nil {
		return nil, err
	}
	return &bangerv1.DeleteSnapshotResponse{}, s.Options.Snapshots.DeleteSnapshot(ctx, req.GetVm(), req.GetTag())
}
