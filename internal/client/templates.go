package client

import (
	"context"

	bangerv1 "banger/api/banger/v1"
)

// WarmTemplate makes the template of a shape, unless it is there.
func (c *Client) WarmTemplate(ctx context.Context, req *bangerv1.WarmTemplateRequest, sink Sink) (*bangerv1.Template, error) {
	var made *bangerv1.Template
	stream, err := c.Templates.WarmTemplate(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.WarmTemplateResponse) { made = pick(made, m.GetTemplate()) })
	}
	return made, err
}
