package daemon

import (
	"context"

	"banger/internal/progress"
)

// defaultKernel names the kernel of a VM that asks for none.
func (h *house) defaultKernel(ctx context.Context) (string, error) {
	k, err := h.kernels.Get(ctx, h.config.defaults.Kernel)
	return k.Name, err
}

// warmImage makes the template of a VM with the defaults on another image.
func (h *house) warmImage(ctx context.Context, image string, sink progress.Sink) {
	if !h.config.restore {
		return
	}
	kernel, err := h.defaultKernel(ctx)
	if err != nil {
		return // the build that asks could not have booted its VM
	}
	spec := h.config.defaults
	spec.Image, spec.Kernel = image, kernel
	h.warmSpec(ctx, spec, sink)
}
