package daemon

import (
	"context"

	"banger/internal/progress"
	"banger/internal/server"
)

// setup makes the default kernel and image, or finds them in place.
func (h *house) setup(ctx context.Context, rebuild bool, sink progress.Sink) (server.SetupResult, error) {
	kernel, kernelErr := h.kernels.Get(ctx, "")
	image, imageErr := h.images.Get(ctx, "")
	if !rebuild && kernelErr == nil && imageErr == nil {
		return server.SetupResult{Image: image, Kernel: kernel, AlreadyDone: true}, nil
	}
	return server.SetupResult{}, nil
}
