package hostnet

import (
	"context"
	"os"
)

// HelperPID returns the number of the helper's process, or 0.
func (c *Client) HelperPID() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.helper == nil {
		return 0
	}
	return c.helper.process.PID()
}

// The helper's requests, one by one.

func (c *Client) AddTAP(ctx context.Context, name string) error {
	return c.do(ctx, Request{Op: OpAddTAP, TAP: name, Owner: os.Getuid()})
}

func (c *Client) DeleteTAP(ctx context.Context, name string) error { return c.deleteTAP(ctx, name) }

func (c *Client) ListTAPs(ctx context.Context) ([]string, error) { return c.listTAPs(ctx) }

func (c *Client) SetRules(ctx context.Context, r Rules) error {
	return c.do(ctx, Request{Op: OpSetRules, Rules: &r})
}
