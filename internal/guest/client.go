// Package guest is the host's side of the guest: the config its init is started with, the keys it
// is known by, and the client of its agent.
package guest

import (
	"context"
	"net"
	"net/http"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"banger/api/agent/v1/agentv1connect"
)

// Bounds of what a guest may make the host hold. What is in a guest may be hostile.
const (
	maxMessage = 1 << 20  // bytes of one message; the agent's own have at most some 64 KiB
	maxHeaders = 64 << 10 // bytes of the headers or trailers of one answer
)

// Client speaks to the agent of one VM: HTTP/2 without TLS over streams of the guest channel. It
// may be used from several goroutines, and dials again when a stream broke.
type Client struct {
	agentv1connect.AgentServiceClient

	transport *http.Transport
	say       Say         // nil: there are no words
	mute      atomic.Bool // the agent answers by HTTP what it does not answer as a word
}

// NewClient returns a client that opens its streams with open, usually a Running's DialGuest.
// Nothing is dialled before the first call.
func NewClient(open func(context.Context) (net.Conn, error)) *Client {
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	t := &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return open(ctx) },
		Protocols:         &protocols,
		IdleConnTimeout:   5 * time.Minute,
		DisableKeepAlives: false,

		MaxResponseHeaderBytes: maxHeaders,
	}
	return &Client{
		// The agent does not compress; what is packed could be a thousand times longer than it looks.
		AgentServiceClient: agentv1connect.NewAgentServiceClient(&http.Client{Transport: t}, "http://agent",
			connect.WithReadMaxBytes(maxMessage), connect.WithAcceptCompression("gzip", nil, nil)),
		transport: t,
	}
}

// Close lets go of idle streams. Calls under way go on until their context ends.
func (c *Client) Close() { c.transport.CloseIdleConnections() }
