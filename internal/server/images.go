package server

import (
	"context"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/progress"
	"banger/internal/vm"
	"banger/internal/wire"
)

// Images is what the handlers need of the image store; the name "" is the default image.
type Images interface {
	List(ctx context.Context) ([]image.Image, error)
	Get(ctx context.Context, name string) (image.Image, error)
	ImageVerbs
}

// ImageVerbs change what images there are. used tells why an image has to stay as it is, or nil.
type ImageVerbs interface {
	Import(ctx context.Context, o image.ImportOptions, sink progress.Sink) (image.Image, error)
	SetDefault(ctx context.Context, name string) (image.Image, error)
	Delete(ctx context.Context, name string, used func(name string) error) error
	Rename(ctx context.Context, name, to string, used func(name string) error) (image.Image, error)
}

// Kernels is what the handlers need of the kernel store; the name "" is the default kernel.
type Kernels interface {
	List(ctx context.Context) ([]kernel.Kernel, error)
	Get(ctx context.Context, name string) (kernel.Kernel, error)
	KernelVerbs
}

// KernelVerbs change what kernels there are.
type KernelVerbs interface {
	Import(ctx context.Context, o kernel.ImportOptions, sink progress.Sink) (kernel.Kernel, error)
	SetDefault(ctx context.Context, name string) (kernel.Kernel, error)
	Delete(ctx context.Context, name string, used func(name string) error) error
	CheckConfig(ctx context.Context, name string) (kernel.Kernel, []kernel.Option, error)
}

// Setup makes what a fresh machine needs; what is in place stays unless rebuild is set.
type Setup func(ctx context.Context, rebuild bool, sink progress.Sink) (SetupResult, error)

// SetupResult is what is in place after a setup.
type SetupResult struct {
	Image       image.Image
	Kernel      kernel.Kernel
	AlreadyDone bool // nothing had to be made
}

type imageService struct {
	*service
	setups setups
}

func (s *imageService) ListImages(ctx context.Context, _ *bangerv1.ListImagesRequest) (*bangerv1.ListImagesResponse, error) {
	list, err := s.Images.List(ctx)
	if err != nil {
		return nil, err
	}
	users, err := s.users(ctx, imageOf)
	if err != nil {
		return nil, err
	}
	def := s.defaultImage(ctx)
	res := &bangerv1.ListImagesResponse{}
	for _, i := range list {
		res.Images = append(res.Images, s.imageForm(i, def.from(i.Name), users[i.Name]))
	}
	return res, nil
}

func (s *imageService) GetImage(ctx context.Context, req *bangerv1.GetImageRequest) (*bangerv1.GetImageResponse, error) {
	i, err := s.image(ctx, req.GetName())
	if err != nil {
		return nil, err
	}
	users, err := s.users(ctx, imageOf)
	if err != nil {
		return nil, err
	}
	return &bangerv1.GetImageResponse{Image: s.imageForm(i, s.defaultImage(ctx).from(i.Name), users[i.Name])}, nil
}

func (s *imageService) ListKernels(ctx context.Context, _ *bangerv1.ListKernelsRequest) (*bangerv1.ListKernelsResponse, error) {
	list, err := s.Kernels.List(ctx)
	if err != nil {
		return nil, err
	}
	users, err := s.users(ctx, kernelOf)
	if err != nil {
		return nil, err
	}
	def := s.defaultKernel(ctx)
	res := &bangerv1.ListKernelsResponse{}
	for _, k := range list {
		res.Kernels = append(res.Kernels, wire.Kernel(k, def.from(k.Name), users[k.Name]))
	}
	return res, nil
}

// users returns the names of the VMs by what one of them has: an image, a kernel.
func (s *service) users(ctx context.Context, of func(vm.Spec) string) (map[string][]string, error) {
	list, err := s.Engine.List(ctx)
	if err != nil {
		return nil, err
	}
	users := map[string][]string{}
	for _, v := range list {
		users[of(v.Spec)] = append(users[of(v.Spec)], v.Spec.Name)
	}
	return users, nil
}

func imageOf(s vm.Spec) string  { return s.Image }
func kernelOf(s vm.Spec) string { return s.Kernel }

// Setup runs once at a time. A second caller joins the one under way; it is cancelled when all its
// callers have gone.
func (s *imageService) Setup(ctx context.Context, req *bangerv1.SetupRequest, out *connect.ServerStream[bangerv1.SetupResponse]) error {
	var result SetupResult
	err := withProgress(ctx, s.Logger,
		func(e progress.Event) error {
			return out.Send(&bangerv1.SetupResponse{Event: &bangerv1.SetupResponse_Progress{Progress: wire.Progress(e)}})
		},
		func(ctx context.Context, sink progress.Sink) (err error) {
			result, err = s.setups.join(ctx, req.GetRebuild(), sink, s.guardedSetup)
			return err
		})
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.SetupResponse{Event: &bangerv1.SetupResponse_Result{Result: &bangerv1.SetupResult{
		Image:  wire.Image(result.Image, s.defaultImage(ctx).from(result.Image.Name), nil),
		Kernel: wire.Kernel(result.Kernel, s.defaultKernel(ctx).from(result.Kernel.Name), nil), AlreadyDone: result.AlreadyDone,
	}}})
}

func (s *imageService) guardedSetup(ctx context.Context, rebuild bool, sink progress.Sink) (r SetupResult, err error) {
	err = guarded(s.Logger, "setup", func() (err error) {
		r, err = s.Options.Setup(ctx, rebuild, sink)
		return err
	})
	return r, err
}

var errOtherSetup = fault.New(fault.Conflict, "another setup is under way").
	WithHint("wait until it is done, then try again")
