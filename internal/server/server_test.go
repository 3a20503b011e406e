package server_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"connectrpc.com/connect"
	"github.com/hashicorp/yamux"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/client"
	"banger/internal/engine"
	"banger/internal/fault"
	"banger/internal/hosttest"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/server"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// world is an engine of nothing but memory.
type world struct {
	mu    sync.Mutex
	vms   map[string]vm.VM
	block chan struct{} // when set, Create and Start wait for it or for their context
	left  []string      // what was rolled back
	agent agentv1connect.AgentServiceClient
}

func newWorld() *world { return &world{vms: map[string]vm.VM{}} }

func (w *world) Create(ctx context.Context, spec vm.Spec, start bool, sink progress.Sink) (vm.VM, error) {
	if spec.Name == "panic" {
		panic("as asked")
	}
	v := vm.VM{ID: "0badc0de", Spec: spec, State: vm.Stopped, CreatedAt: time.Unix(1700000000, 0)}
	w.mu.Lock()
	if _, taken := w.vms[spec.Name]; taken {
		w.mu.Unlock()
		return vm.VM{}, fault.New(fault.Conflict, "there is a VM %s already", spec.Name).WithHint("take another name")
	}
	v.State = vm.Starting
	w.vms[spec.Name] = v
	w.mu.Unlock()
	err := sink.Run("boot", func() error { return w.wait(ctx) })
	w.mu.Lock()
	defer w.mu.Unlock()
	if err != nil {
		delete(w.vms, spec.Name)
		w.left = append(w.left, "create "+spec.Name)
		return vm.VM{}, err
	}
	v.State = vm.Stopped
	if start {
		v.State, v.IP, v.Driver = vm.Running, netip.MustParseAddr("127.0.0.1"), "fake"
	}
	w.vms[spec.Name] = v
	return v, nil
}

func (w *world) wait(ctx context.Context) error {
	if w.block == nil {
		return nil
	}
	select {
	case <-w.block:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (w *world) Get(_ context.Context, ref string) (vm.VM, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	v, ok := w.vms[ref]
	if !ok {
		for _, v := range w.vms {
			if string(v.ID) == ref {
				return v, nil
			}
		}
		return vm.VM{}, fault.New(fault.NotFound, "there is no VM %s", ref).WithHint("banger vm list")
	}
	return v, nil
}

func (w *world) set(ref string, state vm.State) (vm.VM, error) {
	v, err := w.Get(context.Background(), ref)
	if err != nil {
		return v, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	v.State = state
	w.vms[v.Spec.Name] = v
	return v, nil
}

func (w *world) Start(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	if err := sink.Run("boot", func() error { return w.wait(ctx) }); err != nil {
		w.mu.Lock()
		w.left = append(w.left, "start "+ref)
		w.mu.Unlock()
		return vm.VM{}, err
	}
	return w.set(ref, vm.Running)
}

func (w *world) Set(ctx context.Context, ref string, change func(*vm.Spec)) (vm.VM, error) {
	v, err := w.Get(ctx, ref)
	if err == nil {
		change(&v.Spec)
	}
	return v, err
}

func (w *world) Boot(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	sink.Notice("cold")
	return w.Start(ctx, ref, sink)
}

func (w *world) SetVMM(ctx context.Context, ref, vmm string) error {
	v, err := w.Get(ctx, ref)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	v.Spec.VMM, v.Driver = vmm, vmm
	w.vms[v.Spec.Name] = v
	return nil
}

func (w *world) Resume(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	v, err := w.Get(ctx, ref)
	if err == nil && v.State != vm.Suspended {
		return v, fault.New(fault.Conflict, "VM %s is %s", ref, v.State)
	}
	return w.Start(ctx, ref, sink)
}

func (w *world) Suspend(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	if err := sink.Run("save", func() error { return w.wait(ctx) }); err != nil {
		return vm.VM{}, err
	}
	return w.set(ref, vm.Suspended)
}

func (w *world) Fork(ctx context.Context, ref string, o engine.ForkOptions, sink progress.Sink) (engine.Forked, error) {
	v, err := w.Get(ctx, ref)
	if err != nil {
		return engine.Forked{}, err
	}
	if err := sink.Run("save", func() error { return w.wait(ctx) }); err != nil {
		return engine.Forked{}, err
	}
	v.Spec.Name, v.Spec.Ephemeral = o.Name, o.Ephemeral
	return engine.Forked{VMs: slices.Repeat([]vm.VM{v}, o.Count), Paused: time.Second}, nil
}

func (w *world) Clone(ctx context.Context, ref, name string, _ progress.Sink) (vm.VM, error) {
	v, err := w.Get(ctx, ref)
	v.Spec.Name = name
	return v, err
}

func (w *world) Stop(_ context.Context, ref string, _ bool, sink progress.Sink) (vm.VM, error) {
	sink.Update("stop", "asking the agent", -1)
	return w.set(ref, vm.Stopped)
}

func (w *world) Restart(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	return w.Start(ctx, ref, sink)
}

func (w *world) Delete(_ context.Context, ref string, force bool, sink progress.Sink) error {
	v, err := w.Get(context.Background(), ref)
	if err != nil {
		return err
	}
	if v.State == vm.Running && !force {
		_, _, err := vm.Next(v.State, vm.AskDelete)
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	delete(w.vms, v.Spec.Name)
	return nil
}

func (w *world) List(context.Context) ([]vm.VM, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	var list []vm.VM
	for _, v := range w.vms {
		list = append(list, v)
	}
	slices.SortFunc(list, func(a, b vm.VM) int { return strings.Compare(a.Spec.Name, b.Spec.Name) })
	return list, nil
}

func (w *world) Events(_ context.Context, ref string, limit int) ([]store.Event, error) {
	return []store.Event{{ID: 1, VM: "0badc0de", At: time.Unix(1700000000, 0), Operation: "create", Stage: "boot", Duration: time.Second}}, nil
}

func (w *world) Agent(ctx context.Context, ref string) (agentv1connect.AgentServiceClient, error) {
	v, err := w.Get(ctx, ref)
	if err != nil {
		return nil, err
	}
	if v.State != vm.Running {
		return nil, fault.New(fault.Conflict, "VM %s is %s", ref, v.State)
	}
	return w.agent, nil
}

type images struct{ server.ImageVerbs }

func (images) List(context.Context) ([]image.Image, error) {
	return []image.Image{{Name: "debian", RootBytes: 5}}, nil
}

func (images) Get(_ context.Context, name string) (image.Image, error) {
	if name != "" && name != "debian" && name != "alias" {
		return image.Image{}, fault.New(fault.NotFound, "there is no image %s", name)
	}
	return image.Image{Name: "debian", RootBytes: 5}, nil
}

type kernels struct{ server.KernelVerbs }

func (kernels) List(context.Context) ([]kernel.Kernel, error) {
	return []kernel.Kernel{{Name: "cloud"}}, nil
}

func (kernels) Get(context.Context, string) (kernel.Kernel, error) {
	return kernel.Kernel{Name: "cloud"}, nil
}

func options(t testing.TB, w *world) server.Options {
	// Below /tmp itself: the socket's path must be short.
	dir, err := os.MkdirTemp("", "bgr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := paths.Under(dir)
	if err := p.Make(); err != nil {
		t.Fatal(err)
	}
	return server.Options{
		Engine: w, Images: images{}, Kernels: kernels{}, Paths: p, Logger: slog.New(slog.DiscardHandler),
		Defaults: vm.Spec{VMM: "auto", CPUs: 2, MemoryBytes: 1 << 30, DiskBytes: 4 << 30, WorkDiskBytes: 4 << 30, NAT: true, Units: vm.UnitsFast},
		Host:     func(context.Context) server.Host { return server.Host{PID: 1, Bridge: "banger0"} },
		Shutdown: func() {},
		Setup: func(context.Context, bool, progress.Sink) (server.SetupResult, error) {
			return server.SetupResult{Image: image.Image{Name: "debian"}}, nil
		},
	}
}

// serveUnix serves h on the socket.
func serveUnix(t testing.TB, socket string, h http.Handler) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, Protocols: new(http.Protocols)}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
}

// dial serves o on a real socket and returns a client of it.
func dial(t testing.TB, o server.Options) *client.Client {
	t.Helper()
	serveUnix(t, o.Paths.Socket(), server.New(o))
	c, err := client.Dial(t.Context(), client.Options{Paths: o.Paths})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

func create(name string) *bangerv1.CreateVMRequest {
	return &bangerv1.CreateVMRequest{Spec: &bangerv1.VMSpec{Name: name}}
}

func wantKind(t *testing.T, err error, kind fault.Kind) {
	t.Helper()
	var f *fault.Error
	if !errors.As(err, &f) || f.Kind != kind {
		t.Fatalf("got %v (%s), want a fault of kind %s", err, fault.KindOf(err), kind)
	}
}

func TestLifeOverTheSocket(t *testing.T) {
	c := dial(t, options(t, newWorld()))
	ctx := t.Context()
	var stages []string
	made, err := c.Create(ctx, create("web"), func(p *bangerv1.Progress) {
		stages = append(stages, p.GetStage()+" "+p.GetStatus().String())
	})
	if err != nil {
		t.Fatal(err)
	}
	if want := []string{"boot STATUS_STARTED", "boot STATUS_DONE"}; !slices.Equal(stages, want) {
		t.Errorf("progress was %q, want %q", stages, want)
	}
	if made.GetImage() != "debian" || made.GetKernel() != "cloud" || made.GetCpus() != 2 || !made.GetNat() || made.GetState() != "running" {
		t.Errorf("made %v", made)
	}
	named, err := c.Create(ctx, &bangerv1.CreateVMRequest{NoStart: true, Spec: &bangerv1.VMSpec{Name: "b", Image: "alias"}}, nil)
	if err != nil || named.GetImage() != "debian" || named.GetState() != "stopped" {
		t.Errorf("by an alias: %v, %v", named, err)
	}
	if err := c.Delete(ctx, &bangerv1.DeleteVMRequest{Vm: "b"}, nil); err != nil {
		t.Fatal(err)
	}
	_, err = c.Create(ctx, create("web"), nil)
	wantKind(t, err, fault.Conflict)
	if fault.HintOf(err) != "take another name" {
		t.Errorf("hint is %q", fault.HintOf(err))
	}
	list, err := c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
	if err != nil || len(list.GetVms()) != 1 {
		t.Fatalf("listed %v, %v", list, err)
	}
	wantKind(t, c.Delete(ctx, &bangerv1.DeleteVMRequest{Vm: "web"}, nil), fault.Conflict)
	stopped, err := c.Stop(ctx, &bangerv1.StopVMRequest{Vm: "web"}, nil)
	if err != nil || stopped.GetState() != "stopped" {
		t.Fatalf("stopped: %v, %v", stopped, err)
	}
	if _, err := c.Restart(ctx, &bangerv1.RestartVMRequest{Vm: "web"}, nil); err != nil {
		t.Fatal(err)
	}
	suspendAndResume(t, c)
	if err := c.Delete(ctx, &bangerv1.DeleteVMRequest{Vm: "web", Force: true}, nil); err != nil {
		t.Fatal(err)
	}
	_, err = c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Vm: "web"})
	wantKind(t, err, fault.NotFound)
}

// suspendAndResume takes the running VM web there and back.
func suspendAndResume(t *testing.T, c *client.Client) {
	t.Helper()
	ctx := t.Context()
	_, err := c.Start(ctx, &bangerv1.StartVMRequest{Vm: "web", Resume: true}, nil)
	wantKind(t, err, fault.Conflict)
	var stages []string
	sink := func(p *bangerv1.Progress) { stages = append(stages, p.GetStage()+p.GetMessage()) }
	suspended, err := c.Suspend(ctx, &bangerv1.SuspendVMRequest{Vm: "web"}, sink)
	if err != nil || suspended.GetState() != "suspended" || !slices.Contains(stages, "save") {
		t.Fatalf("suspended: %v, %v, told %q", suspended, err, stages)
	}
	_, err = c.VMs.GetSSHEndpoint(ctx, &bangerv1.GetSSHEndpointRequest{Vm: "web", Wait: true})
	wantKind(t, err, fault.Conflict)
	if !strings.Contains(fault.HintOf(err), "vm resume web") {
		t.Errorf("hint is %q", fault.HintOf(err))
	}
	resumed, err := c.Start(ctx, &bangerv1.StartVMRequest{Vm: "web", Resume: true}, nil)
	if err != nil || resumed.GetState() != "running" {
		t.Fatalf("resumed: %v, %v", resumed, err)
	}
	stages = nil
	if _, err := c.Start(ctx, &bangerv1.StartVMRequest{Vm: "web", Cold: true}, sink); err != nil || !slices.Contains(stages, "cold") {
		t.Errorf("a cold start: %v, told %q", err, stages)
	}
	_, err = c.Start(ctx, &bangerv1.StartVMRequest{Vm: "web", Cold: true, Resume: true}, nil)
	wantKind(t, err, fault.Usage)
	_, err = c.Start(ctx, &bangerv1.StartVMRequest{Vm: "web", Resume: true, Vmm: "qemu"}, nil)
	wantKind(t, err, fault.Usage)
	if v, err := c.Start(ctx, &bangerv1.StartVMRequest{Vm: "web", Vmm: "other"}, nil); err != nil || v.GetVmm() != "other" {
		t.Errorf("started under another VMM: %v, %v", v, err)
	}
	_, err = c.Suspend(ctx, &bangerv1.SuspendVMRequest{}, nil)
	wantKind(t, err, fault.Usage)
}

func TestBadRequests(t *testing.T) {
	c := dial(t, options(t, newWorld()))
	ctx := t.Context()
	_, err := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{})
	wantKind(t, err, fault.Usage)
	_, err = c.Start(ctx, &bangerv1.StartVMRequest{}, nil)
	wantKind(t, err, fault.Usage)
	_, err = c.VMs.ListEvents(ctx, &bangerv1.ListEventsRequest{Vm: "x", Limit: -1})
	wantKind(t, err, fault.Usage)
	_, err = c.VMs.ListEvents(ctx, &bangerv1.ListEventsRequest{Vm: "x", Limit: 1001})
	wantKind(t, err, fault.Usage)
	_, err = c.Images.DeleteImage(ctx, &bangerv1.DeleteImageRequest{})
	wantKind(t, err, fault.Usage)
	_, err = c.Images.DeleteKernel(ctx, &bangerv1.DeleteKernelRequest{})
	wantKind(t, err, fault.Usage)
	_, err = c.Images.GetImage(ctx, &bangerv1.GetImageRequest{Name: "nope"})
	wantKind(t, err, fault.NotFound)
	_, err = c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Vm: strings.Repeat("x", 2<<20)})
	wantKind(t, err, fault.Usage)
}

func TestPanicIsAFaultAndTheDaemonGoesOn(t *testing.T) {
	var log bytes.Buffer
	o := options(t, newWorld())
	o.Logger = slog.New(slog.NewTextHandler(&log, nil))
	c := dial(t, o)
	_, err := c.Create(t.Context(), create("panic"), nil)
	wantKind(t, err, fault.Unexpected)
	if !strings.Contains(log.String(), "server_test.go") {
		t.Errorf("the log has no trace of the panic: %s", log.String())
	}
	if _, err := c.Create(t.Context(), create("web"), nil); err != nil {
		t.Fatal(err)
	}
}

func TestCreateIsRolledBackWhenTheClientGoes(t *testing.T) {
	w := newWorld()
	w.block = make(chan struct{})
	c := dial(t, options(t, w))
	ctx, cancel := context.WithCancel(t.Context())
	_, err := c.Create(ctx, create("web"), func(*bangerv1.Progress) { cancel() })
	wantKind(t, err, fault.Interrupted)
	w.mu.Lock() // Create returns after the rollback
	defer w.mu.Unlock()
	if !slices.Equal(w.left, []string{"create web"}) || len(w.vms) != 0 {
		t.Errorf("rolled back %q, left %v", w.left, w.vms)
	}
}

func TestStreamsEndWithTheDaemon(t *testing.T) {
	w := newWorld()
	w.block = make(chan struct{})
	o := options(t, w)
	closing := make(chan struct{})
	o.Closing = closing
	c := dial(t, o)
	_, err := c.Create(t.Context(), create("web"), func(p *bangerv1.Progress) {
		if p.GetStatus() == bangerv1.Progress_STATUS_STARTED {
			close(closing)
		}
	})
	wantKind(t, err, fault.Interrupted)
}

func TestCallsWaitForTheGate(t *testing.T) {
	o := options(t, newWorld())
	o.Gate = server.NewGate()
	c := dial(t, o)
	if _, err := c.Daemon.GetStatus(t.Context(), &bangerv1.GetStatusRequest{}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err := c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
	wantKind(t, err, fault.Timeout)
	o.Gate.Open()
	if _, err = c.VMs.ListVMs(t.Context(), &bangerv1.ListVMsRequest{}); err != nil {
		t.Fatal(err)
	}
}

// scripted is an agent that echoes its input and exits with 7.
type scripted struct {
	agentv1connect.UnimplementedAgentServiceHandler
}

func (scripted) Ping(context.Context, *agentv1.PingRequest) (*agentv1.PingResponse, error) {
	return &agentv1.PingResponse{Build: "b", BootId: "i"}, nil
}

func (scripted) Exec(_ context.Context, s *connect.BidiStream[agentv1.ExecRequest, agentv1.ExecResponse]) error {
	for {
		req, err := s.Receive()
		if errors.Is(err, io.EOF) || req.GetStdinEof() {
			return s.Send(&agentv1.ExecResponse{Output: &agentv1.ExecResponse_Exited{Exited: &agentv1.ExecExited{Code: 7}}})
		}
		if err != nil {
			return err
		}
		if len(req.GetStdin()) > 0 {
			if err := s.Send(&agentv1.ExecResponse{Output: &agentv1.ExecResponse_Stdout{Stdout: req.GetStdin()}}); err != nil {
				return err
			}
		}
	}
}

// withAgent gives w a running VM with a scripted agent.
func withAgent(t *testing.T, w *world) {
	t.Helper()
	withThisAgent(t, w, scripted{})
}

func withThisAgent(t *testing.T, w *world, agent agentv1connect.AgentServiceHandler) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "a")
	mux := http.NewServeMux()
	mux.Handle(agentv1connect.NewAgentServiceHandler(agent))
	serveUnix(t, socket, mux)
	transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) {
		return net.Dial("unix", socket)
	}}
	transport.Protocols.SetUnencryptedHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	w.agent = agentv1connect.NewAgentServiceClient(&http.Client{Transport: transport}, "http://agent")
	w.vms["web"] = vm.VM{ID: "0badc0de", Spec: vm.Spec{Name: "web"}, State: vm.Running, IP: netip.MustParseAddr("127.0.0.1")}
	w.vms["off"] = vm.VM{ID: "0badc0d1", Spec: vm.Spec{Name: "off"}, State: vm.Stopped}
}

func TestExecPassesThrough(t *testing.T) {
	w := newWorld()
	withAgent(t, w)
	c := dial(t, options(t, w))
	stream, err := c.VMs.ExecVM(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	send := func(m *bangerv1.ExecVMRequest) {
		t.Helper()
		if err := stream.Send(m); err != nil {
			t.Fatal(err)
		}
	}
	send(&bangerv1.ExecVMRequest{Input: &bangerv1.ExecVMRequest_Vm{Vm: "web"}})
	chunk := bytes.Repeat([]byte("banger!\n"), 8<<10) // 64 KiB
	go func() {
		for range 32 { // 2 MiB: more than any window
			if stream.Send(execInput(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Stdin{Stdin: chunk}})) != nil {
				return
			}
		}
		_ = stream.Send(execInput(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_StdinEof{StdinEof: true}}))
	}()
	got := 0
	for {
		m, err := stream.Receive()
		if err != nil {
			t.Fatal(err)
		}
		got += len(m.GetExec().GetStdout())
		if e := m.GetExec().GetExited(); e != nil {
			if e.GetCode() != 7 || got != 32*len(chunk) {
				t.Errorf("code %d after %d bytes", e.GetCode(), got)
			}
			break
		}
	}
	if _, err := stream.Receive(); !errors.Is(err, io.EOF) {
		t.Errorf("after the end: %v", err)
	}
}

func execInput(r *agentv1.ExecRequest) *bangerv1.ExecVMRequest {
	return &bangerv1.ExecVMRequest{Input: &bangerv1.ExecVMRequest_Exec{Exec: r}}
}

func TestExecRefusals(t *testing.T) {
	w := newWorld()
	withAgent(t, w)
	c := dial(t, options(t, w))
	for name, want := range map[string]fault.Kind{"off": fault.Conflict, "none": fault.NotFound, "": fault.Usage} {
		stream, err := c.VMs.ExecVM(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&bangerv1.ExecVMRequest{Input: &bangerv1.ExecVMRequest_Vm{Vm: name}}); err != nil {
			t.Fatal(err)
		}
		_, err = stream.Receive()
		wantKind(t, err, want)
	}
}

// mortal is an agent whose machine ends while a program runs: at once, after some output, or within a message.
type mortal struct {
	scripted
	says bool
	die  func()
}

func (m mortal) Exec(ctx context.Context, s *connect.BidiStream[agentv1.ExecRequest, agentv1.ExecResponse]) error {
	if m.says {
		if err := s.Send(&agentv1.ExecResponse{Output: &agentv1.ExecResponse_Stdout{Stdout: []byte("x")}}); err != nil {
			return err
		}
	}
	m.die()
	<-ctx.Done()
	return ctx.Err()
}

// breakable is a connection that its owner can end, with a few bytes that are no whole message before.
type breakable struct {
	net.Conn
	last []byte
	end  error
	over chan struct{}
}

func (b *breakable) Read(p []byte) (int, error) {
	n, err := b.Conn.Read(p)
	select {
	case <-b.over:
		n, b.last = copy(p, b.last), nil
		if n == 0 {
			return 0, b.end
		}
		return n, nil
	default:
		return n, err
	}
}

// A program whose machine ends is no bug of banger's, at whatever moment that is.
func TestExecWhoseMachineEnds(t *testing.T) {
	for name, c := range map[string]struct {
		says bool
		last []byte
		end  error
	}{
		"at once":          {false, nil, io.EOF},
		"after output":     {true, nil, io.EOF},
		"within a message": {true, []byte{0, 0, 7, 0, 0, 0, 0, 0, 1, 0, 0}, io.EOF}, // of a DATA frame (RFC 9113, 6.1)
		"closed":           {true, nil, net.ErrClosed},
		"the channel's":    {true, nil, yamux.ErrSessionShutdown},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld()
			socket := filepath.Join(t.TempDir(), "a")
			over := make(chan struct{})
			mux := http.NewServeMux()
			var conn net.Conn
			mux.Handle(agentv1connect.NewAgentServiceHandler(mortal{says: c.says, die: func() {
				close(over)
				_ = conn.SetReadDeadline(time.Unix(1, 0)) // wakes the reader
			}}))
			serveUnix(t, socket, mux)
			transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (_ net.Conn, err error) {
				if conn, err = net.Dial("unix", socket); err != nil {
					return nil, err
				}
				return &breakable{conn, c.last, c.end, over}, nil
			}}
			transport.Protocols.SetUnencryptedHTTP2(true)
			t.Cleanup(transport.CloseIdleConnections)
			w.agent = agentv1connect.NewAgentServiceClient(&http.Client{Transport: transport}, "http://agent")
			w.vms["web"] = vm.VM{ID: "0badc0de", Spec: vm.Spec{Name: "web"}, State: vm.Running}
			stream, err := dial(t, options(t, w)).VMs.ExecVM(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(&bangerv1.ExecVMRequest{Input: &bangerv1.ExecVMRequest_Vm{Vm: "web"}}); err != nil {
				t.Fatal(err)
			}
			if err := stream.Send(execInput(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{}}})); err != nil {
				t.Fatal(err)
			}
			for err == nil {
				_, err = stream.Receive()
			}
			t.Log(err)
			wantKind(t, err, fault.Conflict)
		})
	}
}

func TestPing(t *testing.T) {
	w := newWorld()
	withAgent(t, w)
	c := dial(t, options(t, w))
	pong, err := c.VMs.PingVM(t.Context(), &bangerv1.PingVMRequest{Vm: "web"})
	if err != nil || pong.GetAgentBuild() != "b" || pong.GetRoundTripNanos() <= 0 {
		t.Errorf("got %v, %v", pong, err)
	}
	_, err = c.VMs.PingVM(t.Context(), &bangerv1.PingVMRequest{Vm: "off"})
	wantKind(t, err, fault.Conflict)
}

// hasty says at once that its SSH server does not listen, however long it might wait.
type hasty struct {
	scripted
	asked *atomic.Int32
}

func (h hasty) AwaitSSH(context.Context, *agentv1.AwaitSSHRequest) (*agentv1.AwaitSSHResponse, error) {
	h.asked.Add(1)
	return &agentv1.AwaitSSHResponse{}, nil
}

// A guest that answers at once does not keep the daemon busy.
func TestHastyAgentIsAskedAtTimes(t *testing.T) {
	w := newWorld()
	var asked atomic.Int32
	withThisAgent(t, w, hasty{asked: &asked})
	c := dial(t, options(t, w))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	_, err := c.VMs.GetSSHEndpoint(ctx, &bangerv1.GetSSHEndpointRequest{Vm: "web", Wait: true})
	wantKind(t, err, fault.Timeout)
	if n := asked.Load(); n < 1 || n > 21 { // one in 100 ms
		t.Errorf("asked %d times within 2 s", n)
	}
}

func TestSSHEndpoint(t *testing.T) {
	w := newWorld()
	withAgent(t, w)
	v := w.vms["web"]
	v.IP = netip.MustParseAddr("127.1.2.3") // nobody listens on port 22 there
	w.vms["web"] = v
	o := options(t, w)
	c := dial(t, o)
	res, err := c.VMs.GetSSHEndpoint(t.Context(), &bangerv1.GetSSHEndpointRequest{Vm: "web"})
	if err != nil {
		t.Fatal(err)
	}
	if e := res.GetEndpoint(); e.GetHost() != "127.1.2.3" || e.GetHostKeyAlias() != "web.vm" || e.GetIdentityFile() != o.Paths.SSHKey() {
		t.Errorf("got %v", e)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second) // enough for the daemon to find out, and to say so
	defer cancel()
	_, err = c.VMs.GetSSHEndpoint(ctx, &bangerv1.GetSSHEndpointRequest{Vm: "web", Wait: true})
	wantKind(t, err, fault.Timeout)
	if !strings.Contains(err.Error(), "SSH server of VM web") {
		t.Errorf("the daemon's own words did not arrive in time: %v", err)
	}
	_, err = c.VMs.GetSSHEndpoint(t.Context(), &bangerv1.GetSSHEndpointRequest{Vm: "off", Wait: true})
	wantKind(t, err, fault.Conflict)
}

func readLog(t *testing.T, c *client.Client, req *bangerv1.ReadLogRequest) (string, error) {
	t.Helper()
	stream, err := c.VMs.ReadLog(t.Context(), req)
	if err != nil {
		return "", err
	}
	defer stream.Close()
	var text strings.Builder
	for stream.Receive() {
		text.Write(stream.Msg().GetData())
	}
	return text.String(), stream.Err()
}

func TestReadLog(t *testing.T) {
	w := newWorld()
	withAgent(t, w)
	o := options(t, w)
	c := dial(t, o)
	_, err := readLog(t, c, &bangerv1.ReadLogRequest{Vm: "web"})
	wantKind(t, err, fault.NotFound)
	dir := o.Paths.VM("0badc0de")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	long := strings.Repeat("a rather long line of a console\n", 5000)
	write(t, filepath.Join(dir, vmm.SerialLog), long+"one\ntwo\nthree\n")
	write(t, filepath.Join(dir, vmm.VMMLog), "no end of line")
	for _, test := range []struct {
		source bangerv1.ReadLogRequest_Source
		lines  int32
		want   string
	}{
		{bangerv1.ReadLogRequest_SOURCE_SERIAL, 2, "two\nthree\n"},
		{bangerv1.ReadLogRequest_SOURCE_SERIAL, 0, long + "one\ntwo\nthree\n"},
		{bangerv1.ReadLogRequest_SOURCE_SERIAL, 5002, long[len(long)-32*4999:] + "one\ntwo\nthree\n"},
		{bangerv1.ReadLogRequest_SOURCE_SERIAL, 100000, long + "one\ntwo\nthree\n"},
		{bangerv1.ReadLogRequest_SOURCE_VMM, 1, "no end of line"},
	} {
		got, err := readLog(t, c, &bangerv1.ReadLogRequest{Vm: "web", Source: test.source, TailLines: test.lines})
		if err != nil || got != test.want {
			t.Errorf("last %d lines: %d bytes (%v), want %d", test.lines, len(got), err, len(test.want))
		}
	}
	_, err = readLog(t, c, &bangerv1.ReadLogRequest{Vm: "web", Source: 99})
	wantKind(t, err, fault.Usage)
	_, err = readLog(t, c, &bangerv1.ReadLogRequest{Vm: "web", TailLines: -1})
	wantKind(t, err, fault.Usage)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestFollowLogThroughRotation(t *testing.T) {
	w := newWorld()
	withAgent(t, w)
	o := options(t, w)
	c := dial(t, o)
	dir := o.Paths.VM("0badc0de")
	path := filepath.Join(dir, vmm.SerialLog)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	stream, err := c.VMs.ReadLog(t.Context(), &bangerv1.ReadLogRequest{Vm: "web", Follow: true})
	if err != nil {
		t.Fatal(err)
	}
	defer stream.Close()
	text := ""
	await := func(want string) {
		t.Helper()
		for !strings.HasSuffix(text, want) && stream.Receive() {
			text += string(stream.Msg().GetData())
		}
		if !strings.HasSuffix(text, want) {
			t.Fatalf("got %q, %v; want it to end with %q", text, stream.Err(), want)
		}
	}
	write(t, path, "one\n") // it was not there when the follower came
	await("one\n")
	f, err := os.OpenFile(path, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteString("two\n"); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	write(t, path, "three\n")
	await("two\nthree\n")
	write(t, path, "4\n") // emptied and written again
	await("4\n")
	if err := os.RemoveAll(dir); err != nil { // the VM is deleted
		t.Fatal(err)
	}
	if stream.Receive() || stream.Err() != nil {
		t.Errorf("after the end: %q, %v", stream.Msg().GetData(), stream.Err())
	}
	if text != "one\ntwo\nthree\n4\n" {
		t.Errorf("read %q", text)
	}
}

func TestSetupRunsOnce(t *testing.T) {
	o := options(t, newWorld())
	var runs int
	release := make(chan struct{})
	o.Setup = func(ctx context.Context, _ bool, sink progress.Sink) (server.SetupResult, error) {
		runs++
		err := sink.Run("kernel", func() error {
			select {
			case <-release:
				return nil
			case <-ctx.Done():
				return ctx.Err()
			}
		})
		return server.SetupResult{Image: image.Image{Name: "debian"}}, err
	}
	c := dial(t, o)
	started := make(chan struct{}, 8)
	sink := func(p *bangerv1.Progress) {
		if p.GetStatus() == bangerv1.Progress_STATUS_STARTED {
			started <- struct{}{}
		}
	}
	first, cancel := context.WithCancel(t.Context())
	errs := make(chan error, 2)
	go func() {
		_, err := c.Setup(first, &bangerv1.SetupRequest{}, sink)
		errs <- err
	}()
	<-started
	_, err := c.Setup(t.Context(), &bangerv1.SetupRequest{Rebuild: true}, nil)
	wantKind(t, err, fault.Conflict)
	go func() {
		res, err := c.Setup(t.Context(), &bangerv1.SetupRequest{}, sink)
		if err == nil && res.GetImage().GetName() != "debian" {
			err = errors.New("no image in the result")
		}
		errs <- err
	}()
	<-started // the second caller is told of the stage it joined
	cancel()  // the first one goes; the setup goes on for the second
	wantKind(t, <-errs, fault.Interrupted)
	close(release)
	if err := <-errs; err != nil {
		t.Error(err)
	}
	if runs != 1 {
		t.Errorf("it ran %d times", runs)
	}
}

func TestSetupEndsWithItsLastCaller(t *testing.T) {
	o := options(t, newWorld())
	ended := make(chan error, 1)
	o.Setup = func(ctx context.Context, _ bool, sink progress.Sink) (server.SetupResult, error) {
		sink.Update("kernel", "downloading", 0.5)
		<-ctx.Done()
		ended <- ctx.Err()
		return server.SetupResult{}, ctx.Err()
	}
	c := dial(t, o)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := c.Setup(ctx, &bangerv1.SetupRequest{}, func(*bangerv1.Progress) { cancel() })
	wantKind(t, err, fault.Interrupted)
	select {
	case <-ended:
	case <-time.After(20 * time.Second):
		t.Error("it still runs")
	}
}

// TestSetupAfterACancelledOne: who asks again while the cancelled one still tidies up gets a setup of his own.
func TestSetupAfterACancelledOne(t *testing.T) {
	o := options(t, newWorld())
	cancelled, tidied := make(chan struct{}), make(chan struct{})
	var runs atomic.Int32
	o.Setup = func(ctx context.Context, _ bool, sink progress.Sink) (server.SetupResult, error) {
		if runs.Add(1) > 1 {
			return server.SetupResult{Image: image.Image{Name: "debian"}}, nil
		}
		sink.Update("kernel", "downloading", 0.5)
		<-ctx.Done()
		close(cancelled)
		<-tidied
		return server.SetupResult{}, ctx.Err()
	}
	c := dial(t, o)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := c.Setup(ctx, &bangerv1.SetupRequest{}, func(*bangerv1.Progress) { cancel() })
	wantKind(t, err, fault.Interrupted)
	<-cancelled
	time.AfterFunc(50*time.Millisecond, func() { close(tidied) })
	res, err := c.Setup(t.Context(), &bangerv1.SetupRequest{Rebuild: true}, nil)
	if err != nil || res.GetImage().GetName() != "debian" || runs.Load() != 2 {
		t.Errorf("got %v, %v after %d runs", res, err, runs.Load())
	}
}

// patient is an agent whose program runs until its caller hangs up.
type patient struct {
	agentv1connect.UnimplementedAgentServiceHandler

	hungUp chan struct{}
}

func (p patient) Exec(ctx context.Context, s *connect.BidiStream[agentv1.ExecRequest, agentv1.ExecResponse]) error {
	if _, err := s.Receive(); err != nil {
		return err
	}
	if err := s.Send(&agentv1.ExecResponse{Output: &agentv1.ExecResponse_Started{Started: &agentv1.ExecStarted{Pid: 1}}}); err != nil {
		return err
	}
	<-ctx.Done()
	close(p.hungUp)
	return ctx.Err()
}

// TestProgramIsHungUpOn: the agent hears at once when the client gives up, and when it dies, with and without
// its input closed. A client that gives up closes its request: else nothing tells the daemon.
func TestProgramIsHungUpOn(t *testing.T) {
	for _, closed := range []bool{false, true} {
		for _, dies := range []bool{false, true} {
			w := newWorld()
			agent := patient{hungUp: make(chan struct{})}
			withThisAgent(t, w, agent)
			o := options(t, w)
			serveUnix(t, o.Paths.Socket(), server.New(o))
			var conns []net.Conn
			transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) {
				conn, err := net.Dial("unix", o.Paths.Socket())
				conns = append(conns, conn)
				return conn, err
			}}
			transport.Protocols.SetUnencryptedHTTP2(true)
			ctx, cancel := context.WithCancel(t.Context())
			stream, err := bangerv1connect.NewVMServiceClient(&http.Client{Transport: transport}, "http://bangerd").ExecVM(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, m := range []*bangerv1.ExecVMRequest{
				{Input: &bangerv1.ExecVMRequest_Vm{Vm: "web"}},
				execInput(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{Argv: []string{"sleep"}}}}),
			} {
				if err := stream.Send(m); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := stream.Receive(); err != nil {
				t.Fatal(err)
			}
			if closed {
				_ = stream.CloseRequest()
			}
			if dies {
				for _, conn := range conns {
					_ = conn.Close()
				}
			} else {
				cancel()
				_ = stream.CloseRequest()
			}
			select {
			case <-agent.hungUp:
			case <-time.After(20 * time.Second):
				t.Errorf("input closed %t, client dies %t: the program runs on", closed, dies)
			}
			cancel()
			transport.CloseIdleConnections()
		}
	}
}

// TestExecEndsWithItsClientBeforeItBegan: the client goes before it said what to run.
func TestExecEndsWithItsClientBeforeItBegan(t *testing.T) {
	w := newWorld()
	withAgent(t, w)
	c := dial(t, options(t, w))
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.VMs.ExecVM(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&bangerv1.ExecVMRequest{Input: &bangerv1.ExecVMRequest_Vm{Vm: "web"}}); err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(50*time.Millisecond, cancel)
	_, err = stream.Receive() // TestMain sees whether the handler ends
	wantKind(t, err, fault.Interrupted)
}

func BenchmarkListVMs200(b *testing.B) {
	w := newWorld()
	for i := range 200 {
		name := "vm-" + strings.Repeat("x", i%20) + string(rune('a'+i%26)) + time.Duration(i).String()
		w.vms[name] = vm.VM{ID: "0badc0de", Spec: vm.Spec{Name: name}, State: vm.Running, IP: netip.MustParseAddr("172.30.0.2")}
	}
	o := options(b, w)
	serveUnix(b, o.Paths.Socket(), server.New(o))
	for b.Loop() { // the whole of what banger vm list does
		c, err := client.Dial(b.Context(), client.Options{Paths: o.Paths})
		if err != nil {
			b.Fatal(err)
		}
		if _, err := c.VMs.ListVMs(b.Context(), &bangerv1.ListVMsRequest{}); err != nil {
			b.Fatal(err)
		}
		c.Close()
	}
}

// TestMain fails when a handler leaves a goroutine behind.
func TestMain(m *testing.M) { hosttest.Main(m) }

func TestExecEndsWithItsClient(t *testing.T) {
	w := newWorld()
	withAgent(t, w)
	c := dial(t, options(t, w))
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := c.VMs.ExecVM(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(&bangerv1.ExecVMRequest{Input: &bangerv1.ExecVMRequest_Vm{Vm: "web"}}); err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(execInput(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Stdin{Stdin: []byte("x")}})); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Receive(); err != nil {
		t.Fatal(err)
	}
	cancel() // the program still waits for input; TestMain sees whether anybody does afterwards
	_, err = stream.Receive()
	wantKind(t, err, fault.Interrupted)
}
