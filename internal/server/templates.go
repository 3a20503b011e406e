package server

import (
	"context"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
	"banger/internal/progress"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/wire"
)

// Templates is what the handlers need of the engine for templates.
type Templates interface {
	Templates(ctx context.Context) ([]template.Template, error)
	DeleteTemplate(ctx context.Context, prefix string) error
	WarmTemplate(ctx context.Context, spec vm.Spec, sink progress.Sink) (template.Template, error)
}

type templateService struct{ *service }

func (s templateService) ListTemplates(ctx context.Context, _ *bangerv1.ListTemplatesRequest) (*bangerv1.ListTemplatesResponse, error) {
	list, err := s.Options.Templates.Templates(ctx)
	if err != nil {
		return nil, err
	}
	res := &bangerv1.ListTemplatesResponse{}
	for _, t := range list {
		res.Templates = append(res.Templates, wire.Template(t))
	}
	return res, nil
}

func (s templateService) DeleteTemplate(ctx context.Context, req *bangerv1.DeleteTemplateRequest) (*bangerv1.DeleteTemplateResponse, error) {
	if req.GetKey() == "" {
		return nil, fault.New(fault.Usage, "the request names no template")
	}
	return &bangerv1.DeleteTemplateResponse{}, s.Options.Templates.DeleteTemplate(ctx, req.GetKey())
}

// WarmTemplate is given up when the client goes away.
func (s templateService) WarmTemplate(ctx context.Context, req *bangerv1.WarmTemplateRequest, out *connect.ServerStream[bangerv1.WarmTemplateResponse]) error {
	spec := wire.Spec(req.GetSpec(), s.Defaults)
	if err := s.resolve(ctx, &spec); err != nil {
		return err
	}
	var made template.Template
	err := withProgress(ctx, s.Logger,
		func(e progress.Event) error {
			return out.Send(&bangerv1.WarmTemplateResponse{Event: &bangerv1.WarmTemplateResponse_Progress{Progress: wire.Progress(e)}})
		},
		func(ctx context.Context, sink progress.Sink) (err error) {
			made, err = s.Options.Templates.WarmTemplate(ctx, spec, sink)
			return err
		})
	if err != nil {
		return err
	}
	return out.Send(&bangerv1.WarmTemplateResponse{Event: &bangerv1.WarmTemplateResponse_Template{Template: wire.Template(made)}})
}
