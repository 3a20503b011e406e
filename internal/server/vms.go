package server

import (
	"context"
	"time"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/progress"
	"banger/internal/vm"
	"banger/internal/wire"
)

// pingTimeout bounds one ping of an agent.
const pingTimeout = 5 * time.Second

// maxEvents is the most lines of history one call returns.
const maxEvents = 1000

type vmService struct{ *service }

func (s *service) message(v vm.VM) *bangerv1.VM { return wire.VM(v, s.Paths.VM(v.ID)) }

// CreateVM is undone when the client goes away.
func (s vmService) CreateVM(ctx context.Context, req *bangerv1.CreateVMRequest, out *connect.ServerStream[bangerv1.CreateVMResponse]) error {
	spec := wire.Spec(req.GetSpec(), s.Defaults)
	if err := s.resolve(ctx, &spec); err != nil {
		return err
	}
	var made vm.VM
	err := withProgress(ctx, s.Logger,
		func(e progress.Event) error {
			return out.Send(&bangerv1.CreateVMResponse{Event: &bangerv1.CreateVMResponse_Progress{Progress: wire.Progress(e)}})
		},
		func(ctx context.Context, sink progress.Sink) (err error) {
			made, err = s.Engine.Create(ctx, spec, !req.GetNoStart(), sink)
			return err
		})
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.CreateVMResponse{Event: &bangerv1.CreateVMResponse_Vm{Vm: s.message(made)}})
}

// resolve replaces "the default" and aliases by names: a VM keeps the image and the kernel it was made
// with when these come to mean others. A name that means nothing stays: the engine says what is wrong with it.
func (s *service) resolve(ctx context.Context, spec *vm.Spec) error {
	image, err := s.Images.Get(ctx, spec.Image)
	switch {
	case err == nil:
		spec.Image = image.Name
	case spec.Image == s.Defaults.Image:
		return explain(s.Named.Image, err)
	}
	kernel, err := s.Kernels.Get(ctx, spec.Kernel)
	switch {
	case err == nil:
		spec.Kernel = kernel.Name
	case spec.Kernel == s.Defaults.Kernel:
		return explain(s.Named.Kernel, err)
	}
	return nil
}

// ListVMs waits for nobody.
func (s vmService) ListVMs(ctx context.Context, _ *bangerv1.ListVMsRequest) (*bangerv1.ListVMsResponse, error) {
	list, err := s.Engine.List(ctx)
	if err != nil {
		return nil, err
	}
	res := &bangerv1.ListVMsResponse{Vms: make([]*bangerv1.VM, 0, len(list))}
	for _, v := range list {
		res.Vms = append(res.Vms, s.message(v))
	}
	return res, nil
}

func (s vmService) GetVM(ctx context.Context, req *bangerv1.GetVMRequest) (*bangerv1.GetVMResponse, error) {
	v, err := s.get(ctx, req.GetVm())
	if err != nil {
		return nil, err
	}
	return &bangerv1.GetVMResponse{Vm: s.message(v)}, nil
}

func (s *service) get(ctx context.Context, ref string) (vm.VM, error) {
	if err := named(ref); err != nil {
		return vm.VM{}, err
	}
	return s.Engine.Get(ctx, ref)
}

func named(ref string) error {
	if ref == "" {
		return fault.New(fault.Usage, "the request names no VM")
	}
	return nil
}

// StartVM is rolled back when the client goes away.
func (s vmService) StartVM(ctx context.Context, req *bangerv1.StartVMRequest, out *connect.ServerStream[bangerv1.StartVMResponse]) error {
	start := s.Engine.Start
	switch {
	case req.GetCold() && req.GetResume():
		return fault.New(fault.Usage, "a start is cold or resumes, not both")
	case req.GetVmm() != "" && req.GetResume():
		return fault.New(fault.Usage, "a VM goes on under the VMM that saved it: it is resumed, or started under another one")
	case req.GetCold():
		start = s.Engine.Boot
	case req.GetResume():
		start = s.Engine.Resume
	}
	v, err := s.change(ctx, req.GetVm(),
		func(p *bangerv1.Progress) error {
			return out.Send(&bangerv1.StartVMResponse{Event: &bangerv1.StartVMResponse_Progress{Progress: p}})
		},
		func(ctx context.Context, sink progress.Sink) (vm.VM, error) {
			if req.GetVmm() != "" {
				if err := s.Engine.SetVMM(ctx, req.GetVm(), req.GetVmm()); err != nil {
					return vm.VM{}, err
				}
			}
			return start(ctx, req.GetVm(), sink)
		})
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.StartVMResponse{Event: &bangerv1.StartVMResponse_Vm{Vm: v}})
}

// SuspendVM lets the guest run on when the client goes away before its memory is saved.
func (s vmService) SuspendVM(ctx context.Context, req *bangerv1.SuspendVMRequest, out *connect.ServerStream[bangerv1.SuspendVMResponse]) error {
	v, err := s.change(ctx, req.GetVm(),
		func(p *bangerv1.Progress) error {
			return out.Send(&bangerv1.SuspendVMResponse{Event: &bangerv1.SuspendVMResponse_Progress{Progress: p}})
		},
		func(ctx context.Context, sink progress.Sink) (vm.VM, error) {
			return s.Engine.Suspend(ctx, req.GetVm(), sink)
		})
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.SuspendVMResponse{Event: &bangerv1.SuspendVMResponse_Vm{Vm: v}})
}

// StopVM goes on when the client goes away: a half-stopped VM serves nobody.
func (s vmService) StopVM(ctx context.Context, req *bangerv1.StopVMRequest, out *connect.ServerStream[bangerv1.StopVMResponse]) error {
	v, err := s.change(ctx, req.GetVm(),
		func(p *bangerv1.Progress) error {
			return out.Send(&bangerv1.StopVMResponse{Event: &bangerv1.StopVMResponse_Progress{Progress: p}})
		},
		func(ctx context.Context, sink progress.Sink) (vm.VM, error) {
			return s.Engine.Stop(context.WithoutCancel(ctx), req.GetVm(), req.GetForce(), sink)
		})
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.StopVMResponse{Event: &bangerv1.StopVMResponse_Vm{Vm: v}})
}

// RestartVM gives up when the client goes away.
func (s vmService) RestartVM(ctx context.Context, req *bangerv1.RestartVMRequest, out *connect.ServerStream[bangerv1.RestartVMResponse]) error {
	v, err := s.change(ctx, req.GetVm(),
		func(p *bangerv1.Progress) error {
			return out.Send(&bangerv1.RestartVMResponse{Event: &bangerv1.RestartVMResponse_Progress{Progress: p}})
		},
		func(ctx context.Context, sink progress.Sink) (vm.VM, error) {
			return s.Engine.Restart(ctx, req.GetVm(), sink)
		})
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.RestartVMResponse{Event: &bangerv1.RestartVMResponse_Vm{Vm: v}})
}

// DeleteVM goes on when the client goes away.
func (s vmService) DeleteVM(ctx context.Context, req *bangerv1.DeleteVMRequest, out *connect.ServerStream[bangerv1.DeleteVMResponse]) error {
	_, err := s.change(ctx, req.GetVm(),
		func(p *bangerv1.Progress) error { return out.Send(&bangerv1.DeleteVMResponse{Progress: p}) },
		func(ctx context.Context, sink progress.Sink) (vm.VM, error) {
			return vm.VM{}, s.Engine.Delete(context.WithoutCancel(ctx), req.GetVm(), req.GetForce(), sink)
		})
	return err
}

// change runs a verb with its progress.
func (s *service) change(ctx context.Context, ref string, send func(*bangerv1.Progress) error,
	verb func(context.Context, progress.Sink) (vm.VM, error),
) (*bangerv1.VM, error) {
	if err := named(ref); err != nil {
		return nil, err
	}
	var after vm.VM
	err := withProgress(ctx, s.Logger,
		func(e progress.Event) error { return send(wire.Progress(e)) },
		func(ctx context.Context, sink progress.Sink) (err error) {
			after, err = verb(ctx, sink)
			return err
		})
	if err != nil {
		return nil, err
	}
	return s.message(after), nil
}

func (s vmService) PingVM(ctx context.Context, req *bangerv1.PingVMRequest) (*bangerv1.PingVMResponse, error) {
	if err := named(req.GetVm()); err != nil {
		return nil, err
	}
	agent, err := s.Engine.Agent(ctx, req.GetVm())
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, pingTimeout)
	defer cancel()
	begin := time.Now()
	pong, err := agent.Ping(ctx, &agentv1.PingRequest{})
	if err != nil {
		return nil, agentFault(err, req.GetVm())
	}
	return &bangerv1.PingVMResponse{
		RoundTripNanos: int64(time.Since(begin)), AgentBuild: pong.GetBuild(), BootId: pong.GetBootId(),
		UptimeSeconds: pong.GetUptimeSeconds(),
	}, nil
}

func (s vmService) ListEvents(ctx context.Context, req *bangerv1.ListEventsRequest) (*bangerv1.ListEventsResponse, error) {
	limit := int(req.GetLimit())
	if limit < 0 || limit > maxEvents {
		return nil, fault.New(fault.Usage, "cannot return %d events", limit).WithHint("ask for 1 to %d", maxEvents)
	}
	if err := named(req.GetVm()); err != nil {
		return nil, err
	}
	events, err := s.Engine.Events(ctx, req.GetVm(), limit)
	if err != nil {
		return nil, err
	}
	res := &bangerv1.ListEventsResponse{}
	for _, e := range events {
		res.Events = append(res.Events, wire.Event(e))
	}
	return res, nil
}
