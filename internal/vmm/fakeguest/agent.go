package fakeguest

import (
	"context"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/serve"
)

// Agent says how the guest's agent does its work. Shutdown begins the end of the machine, once the host
// has its answer; with hangQuiesce a Quiesce is never answered.
func Agent(m *Memory, shutdown func(agentv1.ShutdownRequest_Mode), hangQuiesce bool) serve.Options {
	return serve.Options{
		Runner: Runner{Memory: m},
		Shutdown: func(ctx context.Context, mode agentv1.ShutdownRequest_Mode) error {
			serve.Later(ctx, func() { shutdown(mode) })
			return nil
		},
		// The host's clock is the guest's: there is nothing to step.
		SetTime:  func(t time.Time) (time.Duration, error) { return time.Until(t), nil },
		StepTime: func(time.Duration) error { return nil },
		Status: func(context.Context) (*agentv1.StatusResponse, error) {
			return &agentv1.StatusResponse{
				Hostname: m.Name(), KernelRelease: "fake", SystemState: "running",
				MemoryTotalBytes: 512 << 20, MemoryAvailableBytes: 400 << 20, SshListening: false,
				UnixNanos: time.Now().UnixNano(),
			}, nil
		},
		Quiesce: func(ctx context.Context, _ *agentv1.QuiesceRequest) (*agentv1.QuiesceResponse, error) {
			if hangQuiesce {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			return &agentv1.QuiesceResponse{}, nil
		},
		Adopt: func(_ context.Context, r *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error) {
			return &agentv1.AdoptResponse{}, m.adopt(r)
		},
		BootID: m.BootID,
		Dial:   dial,
	}
}
