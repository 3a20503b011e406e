package server

import (
	"context"

	"google.golang.org/protobuf/types/known/timestamppb"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/build"
)

type daemonService struct{ *service }

// GetStatus answers also while the engine still reconciles; the VMs are not counted then.
func (s daemonService) GetStatus(ctx context.Context, _ *bangerv1.GetStatusRequest) (*bangerv1.GetStatusResponse, error) {
	h := s.Host(ctx)
	res := &bangerv1.GetStatusResponse{
		ApiVersion: build.API, Build: build.ID(), Pid: int32(h.PID), StartedAt: timestamppb.New(h.StartedAt),
		StateDirectory: s.Paths.State, DefaultVmm: h.DefaultVMM, DefaultVmmReason: h.DefaultVMMReason,
		Reconciled: h.Reconciled, Subnet: h.Subnet, Bridge: h.Bridge,
		Dns: &bangerv1.DNSStatus{
			Zone: h.DNS.Zone, Listener: h.DNS.Listener, Forwarder: h.DNS.Forwarder, Records: int32(h.DNS.Records), Problem: h.DNS.Problem,
		},
	}
	res.Network = &bangerv1.NetworkStatus{
		Subnet6: h.Network.Subnet6, SubnetProblem: h.Network.SubnetProblem,
		TapsReady: int32(h.Network.TAPsReady), TapsWanted: int32(h.Network.TAPsWanted),
		Notices: h.Network.Notices, OpenedChains: h.Network.OpenedChains,
	}
	for _, d := range h.Drivers {
		res.Drivers = append(res.Drivers, &bangerv1.Driver{
			Name: d.Name, Available: d.Available, Version: d.Version, Accelerator: d.Accelerator, Reason: d.Reason,
		})
	}
	if !s.Gate.isOpen() {
		return res, nil
	}
	list, err := s.Engine.List(ctx)
	if err != nil {
		return nil, err
	}
	for _, v := range list {
		res.VmCount++
		if v.State.HasProcess() {
			res.RunningCount++
		}
	}
	return res, nil
}

func (s daemonService) Shutdown(context.Context, *bangerv1.ShutdownRequest) (*bangerv1.ShutdownResponse, error) {
	s.Options.Shutdown()
	return &bangerv1.ShutdownResponse{}, nil
}
