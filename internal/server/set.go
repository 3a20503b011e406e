package server

import (
	"context"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/vm"
)

// SetVM goes on when the client goes away: half of a change serves nobody.
func (s vmService) SetVM(ctx context.Context, req *bangerv1.SetVMRequest) (*bangerv1.SetVMResponse, error) {
	if err := named(req.GetVm()); err != nil {
		return nil, err
	}
	v, err := s.Engine.Set(context.WithoutCancel(ctx), req.GetVm(), func(spec *vm.Spec) {
		if req.Nat != nil {
			spec.NAT = req.GetNat()
		}
		if req.Isolated != nil {
			spec.Isolated = req.GetIsolated()
		}
	})
	if err != nil {
		return nil, err
	}
	return &bangerv1.SetVMResponse{Vm: s.message(v)}, nil
}
