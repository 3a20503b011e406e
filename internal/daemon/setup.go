package daemon

import (
	"context"

	"banger/internal/bundle"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/progress"
	"banger/internal/server"
	"banger/internal/vm"
)

// setup makes the default kernel and image, or finds them in place. What is missing is taken from the runtime directory when it is
// there, and else made from Debian's packages; rebuild always means the latter. What the first of the two made stays when the second
// fails, so that the next setup goes on from there.
func (h *house) setup(ctx context.Context, rebuild bool, sink progress.Sink) (server.SetupResult, error) {
	var b bundle.Bundle
	if !rebuild {
		place, err := bundle.Here()
		if err == nil {
			b, err = bundle.Read(place.Dir)
		}
		if err != nil {
			return server.SetupResult{}, err
		}
	}
	_, kernelErr := h.kernels.Get(ctx, "")
	_, imageErr := h.images.Get(ctx, "")
	done := !rebuild && kernelErr == nil && imageErr == nil
	var k kernel.Kernel
	var i image.Image
	var err error
	if file := b.Path(b.Manifest.Kernel); file != "" && kernelErr != nil {
		sink.Notice("the kernel is taken from " + file)
		k, err = h.kernels.FromBundle(ctx, file, sink)
	} else {
		k, err = h.kernels.FromDebian(ctx, kernel.DebianOptions{Mirror: h.config.mirror, Rebuild: rebuild}, sink)
	}
	if err != nil {
		return server.SetupResult{}, err
	}
	if file := b.Path(b.Manifest.Image); file != "" && imageErr != nil {
		sink.Notice("the image is taken from " + file)
		i, err = h.images.FromBundle(ctx, file, sink)
	} else {
		i, err = h.images.Bootstrap(ctx, image.BootstrapOptions{Mirror: h.config.mirror, Rebuild: rebuild}, sink)
	}
	if err != nil {
		return server.SetupResult{}, err
	}
	h.warm(ctx, i.Name, k.Name, sink)
	return server.SetupResult{Image: i, Kernel: k, AlreadyDone: done}, nil
}

// warm makes the template of a VM with the defaults. Without it the first create boots: a failure is told and
// hurts nothing.
func (h *house) warm(ctx context.Context, image, kernel string, sink progress.Sink) {
	if !h.config.restore {
		return
	}
	spec := h.config.defaults
	spec.Image, spec.Kernel = or(spec.Image, image), or(spec.Kernel, kernel)
	h.warmSpec(ctx, spec, sink)
}

func (h *house) warmSpec(ctx context.Context, spec vm.Spec, sink progress.Sink) {
	if _, err := h.engine.WarmTemplate(ctx, spec, sink); err != nil && ctx.Err() == nil {
		h.logger.Warn("the template was not made", "error", err)
		sink.Notice("no template was made, VMs boot until there is one: " + err.Error())
	}
}
