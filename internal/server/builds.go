package server

import (
	"context"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/builder"
	"banger/internal/fault"
	"banger/internal/image"
	"banger/internal/progress"
	"banger/internal/wire"
)

// Builds makes images from recipes.
type Builds interface {
	Build(ctx context.Context, r builder.Request, sink progress.Sink) (image.Image, error)
	Test(ctx context.Context, name string, keepFailed bool, sink progress.Sink) (builder.Report, error)
	// Stale tells what one should know of an image that was built from a recipe, or "", and whether that is another
	// one by now.
	Stale(i image.Image) (notice string, stale bool)
}

// imageForm makes the API's form of an image, with what is to be known of one that was built.
func (s *service) imageForm(i image.Image, defaultFrom string, usedBy []string) *bangerv1.Image {
	notice, stale := "", false
	if s.Builds != nil {
		notice, stale = s.Builds.Stale(i)
	}
	if i.Notice == "" {
		i.Notice = notice
	}
	m := wire.Image(i, defaultFrom, usedBy)
	if b := i.Manifest.Build; b != nil {
		m.Skipped = append(m.Skipped, b.Incomplete...)
		m.Build = &bangerv1.ImageBuild{Recipe: b.Recipe, Parent: b.Parent, Kernel: b.Kernel, Stages: wire.Stages(b.Seconds), Stale: stale}
	}
	return m
}

type buildService struct{ *service }

// BuildImage is undone when the client goes away.
func (s buildService) BuildImage(ctx context.Context, req *bangerv1.BuildImageRequest, out *connect.ServerStream[bangerv1.BuildImageResponse]) error {
	if err := wanted("recipe", req.GetRecipe()); err != nil {
		return err
	}
	if req.GetSizeBytes() < 0 {
		return fault.New(fault.Usage, "the size is negative")
	}
	var made image.Image
	err := withProgress(ctx, s.Logger,
		func(e progress.Event) error {
			return out.Send(&bangerv1.BuildImageResponse{Event: &bangerv1.BuildImageResponse_Progress{Progress: wire.Progress(e)}})
		},
		func(ctx context.Context, sink progress.Sink) (err error) {
			made, err = s.Builds.Build(ctx, builder.Request{
				Recipe: req.GetRecipe(), From: req.GetFrom(), SizeBytes: req.GetSizeBytes(), Name: req.GetName(), KeepFailed: req.GetKeepFailed(),
			}, sink)
			return err
		})
	if err != nil {
		return err
	}
	built := &bangerv1.BuiltImage{Image: s.imageForm(made, s.defaultImage(ctx).from(made.Name), nil)}
	if b := made.Manifest.Build; b != nil {
		built.LeftOut, built.Stages = b.Incomplete, wire.Stages(b.Seconds)
	}
	return out.Send(&bangerv1.BuildImageResponse{Event: &bangerv1.BuildImageResponse_Built{Built: built}})
}

// TestImage answers with what failed; only what kept the tests from running is an error.
func (s buildService) TestImage(ctx context.Context, req *bangerv1.TestImageRequest, out *connect.ServerStream[bangerv1.TestImageResponse]) error {
	if err := wanted("image", req.GetName()); err != nil {
		return err
	}
	var report builder.Report
	err := withProgress(ctx, s.Logger,
		func(e progress.Event) error {
			return out.Send(&bangerv1.TestImageResponse{Event: &bangerv1.TestImageResponse_Progress{Progress: wire.Progress(e)}})
		},
		func(ctx context.Context, sink progress.Sink) (err error) {
			report, err = s.Builds.Test(ctx, req.GetName(), req.GetKeepFailed(), sink)
			return err
		})
	if err != nil {
		return err
	}
	m := &bangerv1.ImageTest{Image: report.Image, Vm: report.VM}
	for _, t := range report.Outcomes {
		m.Tests = append(m.Tests, &bangerv1.TestOutcome{
			Name: t.Name, Passed: t.Passed, Message: t.Message, Seconds: t.Took.Seconds(), Skipped: t.Skipped,
		})
	}
	return out.Send(&bangerv1.TestImageResponse{Event: &bangerv1.TestImageResponse_Result{Result: m}})
}

// ListRecipes reads no file: the recipes are in the program.
func (s buildService) ListRecipes(context.Context, *bangerv1.ListRecipesRequest) (*bangerv1.ListRecipesResponse, error) {
	res := &bangerv1.ListRecipesResponse{}
	for _, name := range builder.Names() {
		r, err := builder.Load(name)
		if err != nil {
			return nil, err
		}
		res.Recipes = append(res.Recipes, &bangerv1.Recipe{
			Name: r.Name, Description: r.Description, From: r.From, PackageCount: int32(len(r.Packages)), Hash: r.Hash,
		})
	}
	return res, nil
}
