package server

import (
	"cmp"
	"context"
	"strings"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/progress"
	"banger/internal/vm"
	"banger/internal/wire"
)

func wanted(what, name string) error {
	if name == "" {
		return fault.New(fault.Usage, "the request names no %s", what)
	}
	return nil
}

// unused is how stores ask whether VMs need what they are about to change.
func (s *service) unused(ctx context.Context, what string, of func(vm.Spec) string) func(name string) error {
	return func(name string) error {
		users, err := s.users(ctx, of)
		if err != nil || len(users[name]) == 0 {
			return err
		}
		return fault.New(fault.Conflict, "%s %s is in use by: %s", what, name, strings.Join(users[name], ", ")).
			WithHint("delete these VMs first: banger vm delete %s", strings.Join(users[name], " "))
	}
}

func (s *imageService) imageMessage(ctx context.Context, i image.Image) (*bangerv1.Image, error) {
	users, err := s.users(ctx, imageOf)
	return wire.Image(i, s.defaultImage(ctx).from(i.Name), users[i.Name]), err
}

func (s *imageService) kernelMessage(ctx context.Context, k kernel.Kernel) (*bangerv1.Kernel, error) {
	users, err := s.users(ctx, kernelOf)
	return wire.Kernel(k, s.defaultKernel(ctx).from(k.Name), users[k.Name]), err
}

// ImportImage is undone when the client goes away.
func (s *imageService) ImportImage(ctx context.Context, req *bangerv1.ImportImageRequest, out *connect.ServerStream[bangerv1.ImportImageResponse]) error {
	if req.GetSource() == "" {
		return fault.New(fault.Usage, "the request says not what to import")
	}
	var made image.Image
	err := withProgress(ctx, s.Logger,
		func(e progress.Event) error {
			return out.Send(&bangerv1.ImportImageResponse{Event: &bangerv1.ImportImageResponse_Progress{Progress: wire.Progress(e)}})
		},
		func(ctx context.Context, sink progress.Sink) (err error) {
			made, err = s.Images.Import(ctx, image.ImportOptions{
				Source: req.GetSource(), Name: req.GetName(), Select: req.GetSelect(), Present: req.GetPresent(),
			}, sink)
			return err
		})
	if err != nil {
		return err
	}
	m, err := s.imageMessage(ctx, made)
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.ImportImageResponse{Event: &bangerv1.ImportImageResponse_Image{Image: m}})
}

func (s *imageService) SetDefaultImage(ctx context.Context, req *bangerv1.SetDefaultImageRequest) (*bangerv1.SetDefaultImageResponse, error) {
	if err := wanted("image", req.GetName()); err != nil {
		return nil, err
	}
	i, err := s.Images.SetDefault(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	m, err := s.imageMessage(ctx, i)
	notice := overridden("image", i.Name, s.Defaults.Image, s.Named.Image, s.defaultImage(ctx))
	return &bangerv1.SetDefaultImageResponse{Image: m, Notice: notice}, err
}

// DeleteImage takes the templates of the image along: they are of no use without it.
func (s *imageService) DeleteImage(ctx context.Context, req *bangerv1.DeleteImageRequest) (*bangerv1.DeleteImageResponse, error) {
	name := req.GetName()
	if err := wanted("image", name); err != nil {
		return nil, err
	}
	if i, err := s.Images.Get(ctx, name); err == nil {
		name = i.Name // by an alias
	}
	if err := notConfigured("image", name, s.defaultImage(ctx).name, s.Named.Image); err != nil {
		return nil, err
	}
	if err := s.Images.Delete(ctx, name, s.unused(ctx, "image", imageOf)); err != nil {
		return nil, err
	}
	return &bangerv1.DeleteImageResponse{}, s.forgetTemplates(ctx, name)
}

func (s *service) forgetTemplates(ctx context.Context, image string) error {
	if s.Templates == nil {
		return nil
	}
	all, err := s.Templates.Templates(ctx)
	if err != nil {
		return err
	}
	for _, t := range all {
		if t.Shape.Image != image {
			continue
		}
		if err := s.Templates.DeleteTemplate(ctx, t.Key); err != nil && fault.KindOf(err) != fault.NotFound {
			return err
		}
	}
	return nil
}

// RenameImage forgets the templates of the image, as they are known by its name.
func (s *imageService) RenameImage(ctx context.Context, req *bangerv1.RenameImageRequest) (*bangerv1.RenameImageResponse, error) {
	if err := wanted("image", req.GetName()); err != nil {
		return nil, err
	}
	before, err := s.Images.Get(ctx, req.GetName()) // its name, where it is called by an alias
	if err != nil {
		return nil, err
	}
	if err := notConfigured("image", before.Name, s.Defaults.Image, s.Named.Image); err != nil {
		return nil, err
	}
	i, err := s.Images.Rename(ctx, before.Name, req.GetNewName(), s.unused(ctx, "image", imageOf))
	if err == nil {
		err = s.forgetTemplates(ctx, before.Name)
	}
	if err != nil {
		return nil, err
	}
	m, err := s.imageMessage(ctx, i)
	return &bangerv1.RenameImageResponse{Image: m}, err
}

func (s *imageService) GetKernel(ctx context.Context, req *bangerv1.GetKernelRequest) (*bangerv1.GetKernelResponse, error) {
	k, err := s.kernel(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	m, err := s.kernelMessage(ctx, k)
	return &bangerv1.GetKernelResponse{Kernel: m}, err
}

// ImportKernel is undone when the client goes away.
func (s *imageService) ImportKernel(ctx context.Context, req *bangerv1.ImportKernelRequest, out *connect.ServerStream[bangerv1.ImportKernelResponse]) error {
	var made kernel.Kernel
	err := withProgress(ctx, s.Logger,
		func(e progress.Event) error {
			return out.Send(&bangerv1.ImportKernelResponse{Event: &bangerv1.ImportKernelResponse_Progress{Progress: wire.Progress(e)}})
		},
		func(ctx context.Context, sink progress.Sink) (err error) {
			made, err = s.Kernels.Import(ctx, kernel.ImportOptions{
				Source: req.GetSource(), Release: req.GetRelease(), Modules: req.GetModulesDirectory(),
				Config: req.GetConfigFile(), Name: req.GetName(),
			}, sink)
			return err
		})
	if err != nil {
		return err
	}
	m, err := s.kernelMessage(ctx, made)
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.ImportKernelResponse{Event: &bangerv1.ImportKernelResponse_Kernel{Kernel: m}})
}

func (s *imageService) SetDefaultKernel(ctx context.Context, req *bangerv1.SetDefaultKernelRequest) (*bangerv1.SetDefaultKernelResponse, error) {
	if err := wanted("kernel", req.GetName()); err != nil {
		return nil, err
	}
	k, err := s.Kernels.SetDefault(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	m, err := s.kernelMessage(ctx, k)
	notice := overridden("kernel", k.Name, s.Defaults.Kernel, s.Named.Kernel, s.defaultKernel(ctx))
	return &bangerv1.SetDefaultKernelResponse{Kernel: m, Notice: notice}, err
}

func (s *imageService) DeleteKernel(ctx context.Context, req *bangerv1.DeleteKernelRequest) (*bangerv1.DeleteKernelResponse, error) {
	if err := wanted("kernel", req.GetName()); err != nil {
		return nil, err
	}
	if err := notConfigured("kernel", req.GetName(), s.defaultKernel(ctx).name, s.Named.Kernel); err != nil {
		return nil, err
	}
	return &bangerv1.DeleteKernelResponse{}, s.Kernels.Delete(ctx, req.GetName(), s.unused(ctx, "kernel", kernelOf))
}

func (s *imageService) CheckKernel(ctx context.Context, req *bangerv1.CheckKernelRequest) (*bangerv1.CheckKernelResponse, error) {
	k, options, err := s.Kernels.CheckConfig(ctx, cmp.Or(req.GetName(), s.Defaults.Kernel))
	if req.GetName() == "" {
		err = explain(s.Named.Kernel, err)
	}
	if err != nil {
		return nil, err
	}
	m, err := s.kernelMessage(ctx, k)
	if err != nil {
		return nil, err
	}
	res := &bangerv1.CheckKernelResponse{Kernel: m}
	for _, o := range options {
		res.Options = append(res.Options, wire.KernelOption(o))
	}
	return res, nil
}
