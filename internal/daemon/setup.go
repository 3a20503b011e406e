package daemon

import (
	"context"

	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/progress"
	"banger/internal/server"
)

// setup makes the default kernel and image, or finds them in place. What the first of the two made
// stays when the second fails, so that the next setup goes on from there.
func (h *house) setup(ctx context.Context, rebuild bool, sink progress.Sink) (server.SetupResult, error) {
	_, kernelErr := h.kernels.Get(ctx, "")
	_, imageErr := h.images.Get(ctx, "")
	done := !rebuild && kernelErr == nil && imageErr == nil
	k, err := h.kernels.FromDebian(ctx, kernel.DebianOptions{Mirror: h.config.mirror, Rebuild: rebuild}, sink)
	if err != nil {
		return server.SetupResult{}, err
	}
	i, err := h.images.Bootstrap(ctx, image.BootstrapOptions{Mirror: h.config.mirror, Rebuild: rebuild}, sink)
	if err != nil {
		return server.SetupResult{}, err
	}
	return server.SetupResult{Image: i, Kernel: k, AlreadyDone: done}, nil
}
