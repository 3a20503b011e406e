package client

import (
	"context"

	bangerv1 "banger/api/banger/v1"
)

// ImportImage makes an image of a file, or of an image in a registry.
func (c *Client) ImportImage(ctx context.Context, req *bangerv1.ImportImageRequest, sink Sink) (*bangerv1.Image, error) {
	var made *bangerv1.Image
	stream, err := c.Images.ImportImage(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.ImportImageResponse) { made = pick(made, m.GetImage()) })
	}
	return made, err
}

// ImportKernel makes a kernel of a file, or of what the host boots.
func (c *Client) ImportKernel(ctx context.Context, req *bangerv1.ImportKernelRequest, sink Sink) (*bangerv1.Kernel, error) {
	var made *bangerv1.Kernel
	stream, err := c.Images.ImportKernel(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.ImportKernelResponse) { made = pick(made, m.GetKernel()) })
	}
	return made, err
}
