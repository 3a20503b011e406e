package server

import (
	"cmp"
	"context"
	"fmt"

	"banger/internal/fault"
	"banger/internal/image"
	"banger/internal/kernel"
)

// Named tells where config.toml names the image and the kernel of VMs that name none, as "/path/config.toml:3". Empty: it does
// not, and the default of the catalogue holds.
type Named struct{ Image, Kernel string }

// chosen is what VMs get that name none.
type chosen struct {
	name   string // "": there is none that works, which the list itself tells
	origin string
}

// from says what makes name the default, or "" when it is not.
func (c chosen) from(name string) string {
	if c.name == "" || c.name != name {
		return ""
	}
	return c.origin
}

// image returns an image by its name; "" is the one of VMs that name none.
func (s *service) image(ctx context.Context, name string) (image.Image, error) {
	if name != "" {
		return s.Images.Get(ctx, name)
	}
	i, err := s.Images.Get(ctx, s.Defaults.Image)
	return i, explain(s.Named.Image, err)
}

// kernel is the same for kernels.
func (s *service) kernel(ctx context.Context, name string) (kernel.Kernel, error) {
	if name != "" {
		return s.Kernels.Get(ctx, name)
	}
	k, err := s.Kernels.Get(ctx, s.Defaults.Kernel)
	return k, explain(s.Named.Kernel, err)
}

// explain adds who asked for what cannot be had.
func explain(place string, err error) error {
	if err == nil || place == "" || fault.KindOf(err) != fault.NotFound {
		return err
	}
	return fault.Wrap(fault.NotFound, err, "%s names the default", place).WithHint("change or remove that line, then: banger daemon restart")
}

func (s *service) defaultImage(ctx context.Context) chosen {
	i, err := s.image(ctx, "")
	if err != nil {
		return chosen{}
	}
	return chosen{i.Name, cmp.Or(s.Named.Image, "image default")}
}

func (s *service) defaultKernel(ctx context.Context) chosen {
	k, err := s.kernel(ctx, "")
	if err != nil {
		return chosen{}
	}
	return chosen{k.Name, cmp.Or(s.Named.Kernel, "kernel default")}
}

// overridden tells that config.toml has the last word over what was just made the default, or "".
func overridden(what, name, wanted, place string, now chosen) string {
	if place == "" || now.name == name {
		return ""
	}
	return fmt.Sprintf("VMs that name no %s get %s: %s says so; change or remove that line, then: banger daemon restart", what, cmp.Or(now.name, wanted), place)
}

// notConfigured refuses to take away, or to rename, what config.toml names.
func notConfigured(what, name, wanted, place string) error {
	if place == "" || name != wanted {
		return nil
	}
	return fault.New(fault.Conflict, "%s %s is the default %s: %s names it", what, name, what, place).
		WithHint("change or remove that line first, then: banger daemon restart")
}
