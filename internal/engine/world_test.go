package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"connectrpc.com/connect"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/capability"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// world is a host that outlives engines: what capabilities made and which machines run. It prints
// itself, so that tests compare whole worlds.
type world struct {
	mu       sync.Mutex
	made     map[string]bool // "<id> <capability>"
	kept     map[string]bool // what outlives a stop, "<id> <capability>"
	machines map[string]*body
	nextPID  int

	reached []string                                      // every point passed, in order
	at      func(ctx context.Context, point string) error // called at each point
	mute    bool                                          // guests never answer
	deaf    bool                                          // guests answer but do not shut down
	hasty   time.Duration                                 // guests shut down before they answer, and end so much later
	late    bool                                          // programs of restored guests ran on too early
}

func newWorld() *world {
	return &world{made: map[string]bool{}, kept: map[string]bool{}, machines: map[string]*body{}, nextPID: 100}
}

var errInjected = fault.New(fault.Precondition, "injected")

// point is where a fault may be injected.
func (w *world) point(ctx context.Context, name string) error {
	w.mu.Lock()
	w.reached = append(w.reached, name)
	at := w.at
	w.mu.Unlock()
	if at == nil {
		return nil
	}
	return at(ctx, name)
}

// arm makes every point from now on be passed to at.
func (w *world) arm(at func(ctx context.Context, point string) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.at, w.reached = at, nil
}

func (w *world) points() []string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.reached)
}

// String lists what there is, one thing a line.
func (w *world) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	var lines []string
	for what := range w.made {
		lines = append(lines, "up "+what)
	}
	for what := range w.kept {
		lines = append(lines, "kept "+what)
	}
	for dir, b := range w.machines {
		if !b.ended() {
			line := "machine " + filepath.Base(dir)
			if b.paused {
				line += " paused"
			}
			lines = append(lines, line)
		}
	}
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

func (w *world) body(id vm.ID) *body {
	w.mu.Lock()
	defer w.mu.Unlock()
	for dir, b := range w.machines {
		if filepath.Base(dir) == string(id) && !b.ended() {
			return b
		}
	}
	return nil
}

// part is a capability of the world.
type part struct {
	w    *world
	name string
}

var (
	_ capability.GuestReadier = part{}
	_ capability.Reattacher   = part{}
	_ capability.Eraser       = part{}
	_ capability.Sweeper      = part{}
)

func (p part) Name() string       { return p.name }
func (p part) Wants(vm.Spec) bool { return true }

func (p part) Check(ctx context.Context, _ vm.VM) error { return p.w.point(ctx, "check "+p.name) }

func (p part) Up(ctx context.Context, v vm.VM, b *capability.Build) (capability.Note, error) {
	if err := p.w.point(ctx, "up "+p.name); err != nil {
		return nil, err
	}
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	p.w.made[string(v.ID)+" "+p.name] = true
	p.w.kept[string(v.ID)+" "+p.name] = true
	return json.RawMessage(`{"made":true}`), os.WriteFile(filepath.Join(b.Machine.Dir, p.name), nil, 0o600)
}

func (p part) Down(ctx context.Context, v vm.VM) error {
	if err := p.w.point(ctx, "down "+p.name); err != nil {
		return err
	}
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	delete(p.w.made, string(v.ID)+" "+p.name)
	return nil
}

func (p part) GuestReady(ctx context.Context, _ vm.VM, _ vmm.Running) error {
	return p.w.point(ctx, "ready "+p.name)
}

func (p part) Reattach(ctx context.Context, _ vm.VM) error { return p.w.point(ctx, "reattach "+p.name) }

func (p part) Erase(ctx context.Context, v vm.VM) error {
	if err := p.w.point(ctx, "erase "+p.name); err != nil {
		return err
	}
	p.w.mu.Lock()
	defer p.w.mu.Unlock()
	delete(p.w.kept, string(v.ID)+" "+p.name)
	return nil
}

func (p part) Sweep(context.Context, []vm.VM) ([]string, error) { return nil, nil }

// driver runs bodies.
type driver struct{ w *world }

func (driver) Name() string { return "test" }
func (driver) Caps(context.Context) (vmm.Caps, error) {
	return vmm.Caps{Accelerator: "test", SlowReason: "a test", MaxCPUs: 8}, nil
}

func (d driver) Check(ctx context.Context, _ vmm.Machine) error {
	return d.w.point(ctx, "driver check")
}

func (d driver) Start(ctx context.Context, m vmm.Machine) (vmm.Running, error) {
	if err := d.w.point(ctx, "driver start"); err != nil {
		return nil, err
	}
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	if b, ok := d.w.machines[m.Dir]; ok && !b.ended() {
		return nil, fault.New(fault.Conflict, "%s has a process already", m.Name)
	}
	d.w.nextPID++
	b := newBody(d.w, d.w.nextPID)
	d.w.machines[m.Dir] = b
	return &running{w: d.w, b: b}, nil
}

func (d driver) Adopt(_ context.Context, m vmm.Machine, h vmm.Handle) (vmm.Running, error) {
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	b, ok := d.w.machines[m.Dir]
	if !ok || b.ended() || h.PID != 0 && h.PID != b.pid {
		return nil, fault.New(fault.NotFound, "%s has no process", m.Name)
	}
	return &running{w: d.w, b: b}, nil
}

// LastExit knows how a guest ended itself, as a console's last line tells it.
func (d driver) LastExit(m vmm.Machine) (vmm.Exit, bool) {
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	b, ok := d.w.machines[m.Dir]
	if !ok || !b.ended() || b.exit.Kind == vmm.ExitKilled {
		return vmm.Exit{}, false
	}
	return b.exit, true
}

// body is a machine: it lives until die.
type body struct {
	agentv1connect.UnimplementedAgentServiceHandler

	w       *world
	pid     int
	boot    string // of the guest: it goes on over suspend and resume
	other   bool   // its memory is another VM's
	paused  bool   // under the world's mu
	ahead   time.Duration
	held    bool
	broken  int  // so many of its next answers to SetTime and Adopt are a stream's end
	late    bool // its programs ran on too early
	lacking []string
	done    chan struct{}
	once    sync.Once
	exit    vmm.Exit
	server  *http.Server
	streams chan net.Conn
}

func newBody(w *world, pid int) *body {
	b := &body{w: w, pid: pid, boot: fmt.Sprint(pid), done: make(chan struct{}), streams: make(chan net.Conn)}
	var h2 http.Protocols
	h2.SetUnencryptedHTTP2(true)
	_, handler := agentv1connect.NewAgentServiceHandler(b)
	b.server = &http.Server{Handler: handler, Protocols: &h2}
	go func() { _ = b.server.Serve(b) }()
	return b
}

func (b *body) Accept() (net.Conn, error) {
	select {
	case c := <-b.streams:
		return c, nil
	case <-b.done:
		return nil, net.ErrClosed
	}
}
func (b *body) Close() error   { return nil }
func (b *body) Addr() net.Addr { return &net.UnixAddr{} }

func (b *body) die(kind vmm.ExitKind, detail string) {
	b.once.Do(func() {
		b.exit = vmm.Exit{Kind: kind, Detail: detail}
		close(b.done)
		_ = b.server.Close()
	})
}

func (b *body) ended() bool {
	select {
	case <-b.done:
		return true
	default:
		return false
	}
}

func (b *body) Ping(ctx context.Context, _ *agentv1.PingRequest) (*agentv1.PingResponse, error) {
	if err := b.w.point(ctx, "ping"); err != nil {
		return nil, err
	}
	return &agentv1.PingResponse{BootId: b.boot}, nil
}

func (b *body) Shutdown(ctx context.Context, r *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	if err := b.w.point(ctx, "shutdown"); err != nil {
		return nil, err
	}
	if b.w.hasty > 0 {
		time.AfterFunc(b.w.hasty, func() { b.die(vmm.ExitPowerOff, "asked to") })
		return nil, connect.NewError(connect.CodeUnavailable, io.ErrUnexpectedEOF)
	}
	if !b.w.deaf {
		go b.die(vmm.ExitPowerOff, "asked to")
	}
	return &agentv1.ShutdownResponse{}, nil
}

// running is one daemon's hold of a body.
type running struct {
	w *world
	b *body
}

func (r *running) Handle() vmm.Handle    { return vmm.Handle{PID: r.b.pid, StartTime: 1} }
func (r *running) Done() <-chan struct{} { return r.b.done }
func (r *running) Exit() vmm.Exit        { return r.b.exit }
func (r *running) Close() error          { return nil }

func (r *running) DialGuest(ctx context.Context) (net.Conn, error) {
	if r.w.mute {
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-r.b.done:
			return nil, errors.New("ended")
		}
	}
	host, guest := net.Pipe()
	select {
	case r.b.streams <- guest:
		return host, nil
	case <-r.b.done:
		return nil, errors.New("ended")
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (r *running) PowerButton(ctx context.Context) error {
	if err := r.w.point(ctx, "button"); err != nil {
		return err
	}
	if !r.w.deaf {
		go r.b.die(vmm.ExitPowerOff, "button")
	}
	return nil
}

func (r *running) Stop(ctx context.Context) error {
	if err := r.w.point(ctx, "driver stop"); err != nil {
		return err
	}
	r.b.die(vmm.ExitStopped, "stopped")
	return nil
}

// bench is an engine in a world.
type bench struct {
	*Engine
	t     *testing.T
	w     *world
	p     paths.Paths
	hook  func(operation, stage string)
	store *store.Store
	boot  string // of the host
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t, w: newWorld(), p: paths.Under(t.TempDir()), boot: "first"}
	if err := b.p.Make(); err != nil {
		t.Fatal(err)
	}
	b.reborn()
	t.Cleanup(b.finish)
	return b
}

// finish ends all that the world runs; a second call does nothing more.
func (b *bench) finish() {
	if err := b.Close(); err != nil {
		b.t.Errorf("close: %v", err)
	}
	b.w.mu.Lock()
	for _, body := range b.w.machines {
		body.die(vmm.ExitKilled, "end of the test")
	}
	b.w.mu.Unlock()
	_ = b.store.Close()
}

var testLimits = vm.Limits{CPUs: 4, MemoryBytes: 8 << 30, VMMs: []string{"test"}}

// reborn is a new daemon on the same state directory and the same host.
func (b *bench) reborn() {
	b.t.Helper()
	s, err := store.Open(b.t.Context(), b.p.Database())
	if err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(func() { _ = s.Close() })
	b.store = s
	b.Engine = New(Config{
		Store: s, Paths: b.p, HostBoot: b.boot, Drivers: []vmm.Driver{driver{b.w}}, Limits: testLimits,
		Capabilities: []capability.Capability{part{b.w, "disk"}, part{b.w, "net"}, part{b.w, "keys"}},
		BootTimeout:  time.Minute, StopTimeout: 200 * time.Millisecond,
		Allocate: func(taken map[netip.Addr]bool) (netip.Addr, error) {
			a := netip.MustParseAddr("10.0.0.2")
			for taken[a] {
				a = a.Next()
			}
			return a, nil
		},
		AfterStage: func(operation, stage string) {
			if b.hook != nil {
				b.hook(operation, stage)
			}
		},
	})
}

// die makes the engine as dead as its process would be: nothing it started goes on.
func (e *Engine) die() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.closed = true
	for id, m := range e.live {
		close(m.taken)
		delete(e.live, id)
	}
}

func spec(name string) vm.Spec {
	return vm.Spec{Name: name, VMM: "auto", CPUs: 1, MemoryBytes: 256 << 20, DiskBytes: 1 << 30, WorkDiskBytes: 1 << 30, Units: vm.UnitsFast}
}

func (b *bench) create(name string) vm.VM {
	b.t.Helper()
	v, err := b.Create(b.t.Context(), spec(name), true, nil)
	if err != nil {
		b.t.Fatalf("create %s: %v", name, err)
	}
	return v
}

// patience is how long tests wait for what comes by itself at once, on a host whose processors are others'.
const patience = 20 * time.Second

// expect waits for a state.
func (b *bench) expect(ref string, want vm.State) vm.VM {
	b.t.Helper()
	deadline := time.Now().Add(patience)
	for {
		v, err := b.Get(b.t.Context(), ref)
		if want == vm.Gone && fault.KindOf(err) == fault.NotFound {
			return v
		}
		if err == nil && v.State == want {
			return v
		}
		if time.Now().After(deadline) {
			b.t.Fatalf("VM %s is %q (%s, %v), want %q", ref, v.State, v.Reason, err, want)
		}
		time.Sleep(5 * time.Millisecond)
	}
}

// nothingLeft fails when there is more than an empty host with an empty store.
func (b *bench) nothingLeft(when string) {
	b.t.Helper()
	if all, err := b.List(context.Background()); err != nil || len(all) > 0 {
		b.t.Fatalf("%s: rows left: %+v, %v", when, all, err)
	}
	if s := b.w.String(); s != "" {
		b.t.Fatalf("%s: left on the host:\n%s", when, s)
	}
	entries, err := os.ReadDir(b.p.VMs())
	if err != nil || len(entries) > 0 {
		b.t.Fatalf("%s: files left: %v, %v", when, entries, err)
	}
}

// up lists what a running VM has in the world.
func up(id vm.ID) string {
	var lines []string
	for _, c := range []string{"disk", "keys", "net"} {
		lines = append(lines, "up "+string(id)+" "+c, "kept "+string(id)+" "+c)
	}
	lines = append(lines, "machine "+string(id))
	slices.Sort(lines)
	return strings.Join(lines, "\n")
}

// down lists what a stopped VM has.
func down(id vm.ID) string {
	var lines []string
	for _, c := range []string{"disk", "keys", "net"} {
		lines = append(lines, "kept "+string(id)+" "+c)
	}
	return strings.Join(lines, "\n")
}

// failAt returns an injector that fails once, at the nth point of that name.
func failAt(point string, n int, err error) func(context.Context, string) error {
	var mu sync.Mutex
	seen := map[string]int{}
	return func(_ context.Context, reached string) error {
		mu.Lock()
		defer mu.Unlock()
		seen[reached]++
		if reached == point && seen[reached] == n {
			return err
		}
		return nil
	}
}

// occurrences numbers repeated points: each gets its turn.
func occurrences(points []string) []struct {
	point string
	n     int
} {
	var all []struct {
		point string
		n     int
	}
	count := map[string]int{}
	for _, p := range points {
		count[p]++
		all = append(all, struct {
			point string
			n     int
		}{p, count[p]})
	}
	return all
}
