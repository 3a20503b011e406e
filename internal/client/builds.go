package client

import (
	"context"

	bangerv1 "banger/api/banger/v1"
)

// BuildImage makes an image of a recipe.
func (c *Client) BuildImage(ctx context.Context, req *bangerv1.BuildImageRequest, sink Sink) (*bangerv1.BuiltImage, error) {
	var built *bangerv1.BuiltImage
	stream, err := c.Builds.BuildImage(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.BuildImageResponse) { built = pick(built, m.GetBuilt()) })
	}
	return built, err
}

// TestImage runs the tests of an image's recipe in a VM of it.
func (c *Client) TestImage(ctx context.Context, req *bangerv1.TestImageRequest, sink Sink) (*bangerv1.ImageTest, error) {
	var result *bangerv1.ImageTest
	stream, err := c.Builds.TestImage(ctx, req)
	if err == nil {
		err = drain(stream, sink, func(m *bangerv1.TestImageResponse) { result = pick(result, m.GetResult()) })
	}
	return result, err
}
