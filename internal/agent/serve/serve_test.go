package serve_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sync/errgroup"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/agent/serve"
	"banger/internal/channel"
	"banger/internal/hosttest"
)

func TestMain(m *testing.M) { hosttest.Main(m) }

// runner answers Exec from a function.
type runner func(context.Context, serve.Program) serve.Exit

func (r runner) Run(ctx context.Context, p serve.Program) serve.Exit { return r(ctx, p) }

// start serves o on one connection of a guest channel and returns a client.
func start(t *testing.T, o serve.Options) (agentv1connect.AgentServiceClient, func()) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	var g errgroup.Group
	g.Go(func() error {
		c, err := l.Accept()
		if err != nil {
			return nil
		}
		// The host's leaving ends the pipe, which ends the service; it is a reset when the host left something unread.
		err = serve.Serve(ctx, channel.Listen(c, nil), serve.New(o))
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.ECONNRESET) {
			return nil
		}
		return err
	})
	host := channel.NewHost(func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	})
	var p http.Protocols
	p.SetUnencryptedHTTP2(true)
	transport := &http.Transport{Protocols: &p, TLSClientConfig: &tls.Config{}, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return host.Open(ctx)
	}}
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		host.Close()
		cancel()
		l.Close()
		if err := g.Wait(); err != nil {
			t.Errorf("serve: %v", err)
		}
	})
	return agentv1connect.NewAgentServiceClient(&http.Client{Transport: transport}, "http://agent"), func() { host.Close() }
}

func within(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func TestUnary(t *testing.T) {
	var asked agentv1.ShutdownRequest_Mode
	var stepped time.Duration
	client, _ := start(t, serve.Options{
		BootID:   "boot",
		Shutdown: func(_ context.Context, m agentv1.ShutdownRequest_Mode) error { asked = m; return nil },
		SetTime:  func(to time.Time) (time.Duration, error) { return time.Duration(to.UnixNano()), nil },
		StepTime: func(by time.Duration) error { stepped += by; return nil },
	})
	ctx := within(t)
	ping, err := client.Ping(ctx, &agentv1.PingRequest{})
	if err != nil || ping.BootId != "boot" || ping.Build == "" || ping.UptimeSeconds <= 0 {
		t.Fatalf("ping: %v, %v", ping, err)
	}
	if _, err := client.Shutdown(ctx, &agentv1.ShutdownRequest{}); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("shutdown without a mode: %v", err)
	}
	if _, err := client.Shutdown(ctx, &agentv1.ShutdownRequest{Mode: agentv1.ShutdownRequest_MODE_REBOOT}); err != nil || asked != agentv1.ShutdownRequest_MODE_REBOOT {
		t.Errorf("reboot: %v, asked %v", err, asked)
	}
	if r, err := client.SetTime(ctx, &agentv1.SetTimeRequest{UnixNanos: 42}); err != nil || r.StepNanos != 42 {
		t.Errorf("set time: %v, %v", r, err)
	}
	for _, step := range []time.Duration{0, 30, -7} {
		r, err := client.SetTime(ctx, &agentv1.SetTimeRequest{StepNanos: int64(step)})
		if err != nil || r.StepNanos != int64(step) || time.Since(time.Unix(0, r.UnixNanos)).Abs() > time.Minute {
			t.Errorf("step by %v: %v, %v", step, r, err)
		}
	}
	if stepped != 23 {
		t.Errorf("the clock was moved by %v", stepped)
	}
	for _, bad := range []*agentv1.SetTimeRequest{{UnixNanos: -1}, {UnixNanos: 1, StepNanos: 1}} {
		if _, err := client.SetTime(ctx, bad); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("%v: %v", bad, err)
		}
	}
	if _, err := client.Status(ctx, &agentv1.StatusRequest{}); connect.CodeOf(err) != connect.CodeUnimplemented {
		t.Errorf("status: %v", err)
	}
}

func TestSaveAndRestore(t *testing.T) {
	hang := false
	var adopted *agentv1.AdoptRequest
	client, _ := start(t, serve.Options{
		Quiesce: func(ctx context.Context, r *agentv1.QuiesceRequest) (*agentv1.QuiesceResponse, error) {
			if hang {
				<-ctx.Done()
				return nil, ctx.Err()
			}
			if r.GetForTemplate() {
				return nil, errors.New("not now")
			}
			return &agentv1.QuiesceResponse{}, nil
		},
		Adopt: func(_ context.Context, r *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error) {
			adopted = r
			return &agentv1.AdoptResponse{}, nil
		},
	})
	ctx := within(t)
	if _, err := client.Quiesce(ctx, &agentv1.QuiesceRequest{}); err != nil {
		t.Errorf("quiesce: %v", err)
	}
	if _, err := client.Quiesce(ctx, &agentv1.QuiesceRequest{ForTemplate: true}); connect.CodeOf(err) != connect.CodeInternal {
		t.Errorf("quiesce that fails: %v", err)
	}
	hang = true
	short, cancel := context.WithTimeout(ctx, 50*time.Millisecond)
	defer cancel()
	if _, err := client.Quiesce(short, &agentv1.QuiesceRequest{}); connect.CodeOf(err) != connect.CodeDeadlineExceeded {
		t.Errorf("quiesce that hangs: %v", err)
	}
	entropy := make([]byte, 64)
	if _, err := client.Adopt(ctx, &agentv1.AdoptRequest{Entropy: entropy}); err != nil || len(adopted.GetEntropy()) != 64 {
		t.Errorf("adopt: %v, %v", adopted, err)
	}
	for _, bad := range []*agentv1.AdoptRequest{{}, {Entropy: entropy[:31]}} {
		if _, err := client.Adopt(ctx, bad); connect.CodeOf(err) != connect.CodeInvalidArgument {
			t.Errorf("adopt of %v: %v", bad, err)
		}
	}
	bare, _ := start(t, serve.Options{})
	if _, err := bare.Adopt(ctx, &agentv1.AdoptRequest{Entropy: entropy}); connect.CodeOf(err) != connect.CodeUnimplemented {
		t.Errorf("adopt by an agent that cannot: %v", err)
	}
}

func TestExec(t *testing.T) {
	client, _ := start(t, serve.Options{Runner: runner(func(ctx context.Context, p serve.Program) serve.Exit {
		p.Started(77)
		in, err := io.ReadAll(p.Stdin)
		if err != nil {
			return serve.Exit{Error: err.Error()}
		}
		_, _ = p.Stdout.Write(in)
		_, _ = p.Stderr.Write([]byte(p.Argv[0]))
		sig := <-p.Signals
		return serve.Exit{Code: 128 + int(sig), Signal: sig}
	})})
	stream, err := client.Exec(within(t))
	if err != nil {
		t.Fatal(err)
	}
	blob := bytes.Repeat([]byte("banger"), 50_000)
	send := func(r *agentv1.ExecRequest) {
		t.Helper()
		if err := stream.Send(r); err != nil {
			t.Fatal(err)
		}
	}
	send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{Argv: []string{"x"}, Stdin: true}}})
	for i := 0; i < len(blob); i += 30_000 {
		send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Stdin{Stdin: blob[i : i+30_000]}})
	}
	send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_StdinEof{StdinEof: true}})
	send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Signal{Signal: int32(syscall.SIGUSR1)}})
	var out, errs []byte
	var pid, code int32
	for {
		r, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if r.GetStarted() != nil {
			pid = r.GetStarted().Pid
		}
		if len(r.GetStdout()) > 64<<10 {
			t.Errorf("a chunk of %d bytes", len(r.GetStdout()))
		}
		out, errs = append(out, r.GetStdout()...), append(errs, r.GetStderr()...)
		if e := r.GetExited(); e != nil {
			code = e.Code
		}
	}
	if err := errors.Join(stream.CloseRequest(), stream.CloseResponse()); err != nil {
		t.Error(err)
	}
	if !bytes.Equal(out, blob) || string(errs) != "x" || pid != 77 || code != 128+int32(syscall.SIGUSR1) {
		t.Errorf("%d bytes, %q, pid %d, code %d", len(out), errs, pid, code)
	}
}

func TestExecMustStart(t *testing.T) {
	client, _ := start(t, serve.Options{})
	stream, err := client.Exec(within(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Signal{Signal: 9}}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Receive(); connect.CodeOf(err) != connect.CodeInvalidArgument {
		t.Errorf("got %v", err)
	}
	_ = stream.CloseRequest()
	_ = stream.CloseResponse()
}

// Whatever way the client goes, the program's context ends.
func TestExecClientVanishes(t *testing.T) {
	for name, vanish := range map[string]func(cancel, cut func()){
		"call cancelled": func(cancel, _ func()) { cancel() },
		"channel lost":   func(_, cut func()) { cut() },
	} {
		t.Run(name, func(t *testing.T) {
			ended := make(chan struct{})
			client, cut := start(t, serve.Options{Runner: runner(func(ctx context.Context, p serve.Program) serve.Exit {
				p.Started(1)
				<-ctx.Done()
				close(ended)
				return serve.Exit{}
			})})
			ctx, cancel := context.WithCancel(within(t))
			defer cancel()
			stream, err := client.Exec(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{Argv: []string{"x"}, Stdin: true}}}); err != nil {
				t.Fatal(err)
			}
			if _, err := stream.Receive(); err != nil {
				t.Fatal(err)
			}
			vanish(cancel, cut)
			// A cancelled call is given up on the wire when its ends are closed, not before.
			_ = stream.CloseRequest()
			_ = stream.CloseResponse()
			select {
			case <-ended:
			case <-time.After(20 * time.Second):
				t.Fatal("the program runs on")
			}
		})
	}
}
