// Package client is how programs talk to bangerd: it finds the daemon, starts it when it does not
// run, replaces it when it is of another build, and offers the API's typed clients. All its
// errors are faults.
package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strconv"
	"time"

	"connectrpc.com/connect"

	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/build"
	"banger/internal/fault"
	"banger/internal/paths"
)

// Limits on how long things take.
const (
	helloTimeout    = 5 * time.Second  // a daemon that lives answers in a millisecond
	unaryTimeout    = 30 * time.Second // a call without a deadline of its own
	endpointTimeout = 5 * time.Minute  // GetSSHEndpoint may wait for a boot in software emulation
)

// The headers in which a daemon of any version tells what it is, on every answer.
const (
	HeaderBuild = "Banger-Build"
	HeaderAPI   = "Banger-Api"
	HelloPath   = "/hello"
)

// Options tell Dial what to do about the daemon.
type Options struct {
	Paths paths.Paths
	// AutoStart starts a daemon that does not run and replaces one of another build. Without it,
	// Dial takes whatever runs.
	AutoStart bool
	// Notice is told, once, what the user should know: that the daemon was replaced. May be nil.
	Notice func(string)
	// Command starts the daemon. Empty: bangerd beside the running executable, else in PATH.
	Command []string
	// Env is the daemon's environment; nil: the caller's own.
	Env []string
}

// Client is a connection to the daemon. It may be used by several goroutines.
type Client struct {
	VMs    bangerv1connect.VMServiceClient
	Images bangerv1connect.ImageServiceClient
	Builds bangerv1connect.BuildServiceClient
	Daemon bangerv1connect.DaemonServiceClient

	Templates bangerv1connect.TemplateServiceClient
	Snapshots bangerv1connect.SnapshotServiceClient
	Network   bangerv1connect.NetworkServiceClient
	// Hello is what the daemon said of itself when the client connected.
	Hello Hello

	http   *http.Client
	socket string
}

// Hello is what a daemon of any version says of itself.
type Hello struct {
	Build string
	API   int
}

// Dial connects to the daemon of o.Paths. With o.AutoStart it runs, and is of this build, afterwards.
// The errors: Precondition when it does not run or cannot be started, Timeout when it does not
// answer, Usage when it is newer than this client can talk to.
func Dial(ctx context.Context, o Options) (*Client, error) {
	if err := paths.CheckSocket(o.Paths.Socket()); err != nil {
		return nil, err
	}
	c := connectTo(o.Paths.Socket())
	err := c.greet(ctx)
	silent := errors.Is(err, context.DeadlineExceeded) // it lives: only the user may decide to kill it
	if o.AutoStart && !c.usable(err) && !silent {
		err = c.ensureDaemon(ctx, o)
	}
	if err == nil {
		err = checkAPI(c.Hello)
	}
	if err != nil {
		c.Close()
		return nil, explain(err, o.Paths)
	}
	return c, nil
}

// usable tells whether the daemon that answered greet may stay.
func (c *Client) usable(greetErr error) bool {
	return greetErr == nil && (c.Hello.Build == build.ID() || c.Hello.API > build.API)
}

// Close ends the client's connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func connectTo(socket string) *Client {
	transport := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", socket)
		},
		Protocols: new(http.Protocols),
		// A stream has no deadline, but a daemon that stopped answering is noticed.
		HTTP2: &http.HTTP2Config{SendPingTimeout: 15 * time.Second, PingTimeout: 15 * time.Second},
	}
	transport.Protocols.SetUnencryptedHTTP2(true)
	hc := &http.Client{Transport: transport}
	// On one machine packing costs more than it saves: nine tenths of what the daemon does for a program's output.
	with := connect.WithClientOptions(connect.WithInterceptors(interceptor{socket}), connect.WithAcceptCompression("gzip", nil, nil))
	const url = "http://bangerd"
	return &Client{
		VMs:       bangerv1connect.NewVMServiceClient(hc, url, with),
		Images:    bangerv1connect.NewImageServiceClient(hc, url, with),
		Builds:    bangerv1connect.NewBuildServiceClient(hc, url, with),
		Daemon:    bangerv1connect.NewDaemonServiceClient(hc, url, with),
		Templates: bangerv1connect.NewTemplateServiceClient(hc, url, with),
		Snapshots: bangerv1connect.NewSnapshotServiceClient(hc, url, with),
		Network:   bangerv1connect.NewNetworkServiceClient(hc, url, with),

		http:   hc,
		socket: socket,
	}
}

// greet asks the daemon what it is. It is a plain HTTP request, so that daemon and client of any
// two versions understand each other this far.
func (c *Client) greet(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, helloTimeout)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://bangerd"+HelloPath, nil)
	if err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot make a request")
	}
	res, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	_, _ = io.Copy(io.Discard, io.LimitReader(res.Body, 1<<16)) // only the headers matter
	api, err := strconv.Atoi(res.Header.Get(HeaderAPI))
	if err != nil {
		return fault.New(fault.Precondition, "what listens on the daemon's socket is not bangerd").
			WithHint("end that program, or remove %s", c.socket)
	}
	c.Hello = Hello{Build: res.Header.Get(HeaderBuild), API: api}
	return nil
}

func checkAPI(h Hello) error {
	if h.API <= build.API {
		return nil
	}
	return fault.New(fault.Usage, "this banger (%s) is older than the running daemon (%s)", build.ID(), h.Build).
		WithHint("use the newer banger, or go back with: banger daemon restart")
}

// explain makes a fault of whatever kept the client from a daemon.
func explain(err error, p paths.Paths) error {
	var f *fault.Error
	switch {
	case errors.As(err, &f):
		return err
	case errors.Is(err, context.DeadlineExceeded):
		return notAnswering(p)
	case errors.Is(err, context.Canceled):
		return fault.New(fault.Interrupted, "interrupted")
	case absent(err):
		return fault.New(fault.Precondition, "the daemon is not running").WithHint("start it with: banger daemon start")
	}
	return fault.Wrap(fault.Precondition, err, "cannot reach the daemon").
		WithHint("banger daemon restart starts it anew, VMs run on")
}

func notAnswering(p paths.Paths) error {
	who := "the daemon"
	if h, proc := holder(p); proc != nil {
		who = fmt.Sprintf("the daemon (pid %d)", h.PID)
		_ = proc.Close()
	}
	return fault.New(fault.Timeout, "%s does not answer", who).
		WithHint("banger daemon restart starts it anew, VMs run on; its log is %s", p.DaemonLog())
}
