package server

import (
	"context"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/engine"
	"banger/internal/fault"
	"banger/internal/progress"
	"banger/internal/vm"
	"banger/internal/wire"
)

// Forks is what the handlers need of the engine to make VMs of other VMs.
type Forks interface {
	Fork(ctx context.Context, ref string, w engine.ForkOptions, sink progress.Sink) (engine.Forked, error)
	Clone(ctx context.Context, ref, name string, sink progress.Sink) (vm.VM, error)
}

// ForkVM is undone when the client goes away; the source runs on.
func (s vmService) ForkVM(ctx context.Context, req *bangerv1.ForkVMRequest, out *connect.ServerStream[bangerv1.ForkVMResponse]) error {
	if err := named(req.GetVm()); err != nil {
		return err
	}
	if req.GetCount() < 0 {
		return fault.New(fault.Usage, "cannot make %d forks", req.GetCount())
	}
	var done engine.Forked
	err := withProgress(ctx, s.Logger,
		func(e progress.Event) error {
			return out.Send(&bangerv1.ForkVMResponse{Event: &bangerv1.ForkVMResponse_Progress{Progress: wire.Progress(e)}})
		},
		func(ctx context.Context, sink progress.Sink) (err error) {
			w := engine.ForkOptions{Name: req.GetName(), Count: int(req.GetCount()), Ephemeral: req.GetEphemeral()}
			done, err = s.Engine.Fork(ctx, req.GetVm(), w, sink)
			return err
		})
	if err != nil {
		return err
	}
	res := &bangerv1.Forked{PauseNanos: int64(done.Paused)}
	for _, v := range done.VMs {
		res.Vms = append(res.Vms, s.message(v))
	}
	return out.Send(&bangerv1.ForkVMResponse{Event: &bangerv1.ForkVMResponse_Forked{Forked: res}})
}

// CloneVM is undone when the client goes away.
func (s vmService) CloneVM(ctx context.Context, req *bangerv1.CloneVMRequest, out *connect.ServerStream[bangerv1.CloneVMResponse]) error {
	v, err := s.change(ctx, req.GetVm(),
		func(p *bangerv1.Progress) error {
			return out.Send(&bangerv1.CloneVMResponse{Event: &bangerv1.CloneVMResponse_Progress{Progress: p}})
		},
		func(ctx context.Context, sink progress.Sink) (vm.VM, error) {
			return s.Engine.Clone(ctx, req.GetVm(), req.GetName(), sink)
		})
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.CloneVMResponse{Event: &bangerv1.CloneVMResponse_Vm{Vm: v}})
}
