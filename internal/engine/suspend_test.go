package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// The world's machines can be saved: a guest's memory is which boot it is of.

var (
	_ saveable     = (*running)(nil)
	_ vmm.Restorer = driver{}
)

func (r *running) Pause(ctx context.Context) error  { return r.halt(ctx, "pause", true) }
func (r *running) Resume(ctx context.Context) error { return r.halt(ctx, "go on", false) }

func (r *running) halt(ctx context.Context, point string, paused bool) error {
	if err := r.w.point(ctx, point); err != nil {
		return err
	}
	if r.b.ended() {
		return errors.New("the machine has ended")
	}
	r.w.mu.Lock()
	defer r.w.mu.Unlock()
	if r.b.paused && !paused {
		r.b.ahead -= time.Hour // that is how long it stood still
	}
	r.b.paused = paused
	return nil
}

func (r *running) Save(ctx context.Context, dir string) error {
	if err := r.w.point(ctx, "save"); err != nil {
		return err
	}
	r.w.mu.Lock()
	defer r.w.mu.Unlock()
	if !r.b.paused {
		return errors.New("the machine runs")
	}
	return os.WriteFile(filepath.Join(dir, vmm.SavedState), []byte(r.b.boot), 0o600)
}

func (d driver) CheckSaved(ctx context.Context, _ vmm.Machine, dir string) error {
	if err := d.w.point(ctx, "check saved"); err != nil {
		return err
	}
	if _, err := os.Stat(filepath.Join(dir, vmm.SavedState)); err != nil {
		return fault.Wrap(fault.Precondition, err, "the state is damaged")
	}
	return nil
}

func (d driver) Restore(ctx context.Context, m vmm.Machine, dir string) (vmm.Running, error) {
	if err := d.w.point(ctx, "restore"); err != nil {
		return nil, err
	}
	boot, err := os.ReadFile(filepath.Join(dir, vmm.SavedState))
	if err != nil {
		return nil, err
	}
	d.w.mu.Lock()
	defer d.w.mu.Unlock()
	if b, ok := d.w.machines[m.Dir]; ok && !b.ended() {
		return nil, fault.New(fault.Conflict, "%s has a process already", m.Name)
	}
	d.w.nextPID++
	b := newBody(d.w, d.w.nextPID)
	b.boot, b.other, b.ahead, b.late = string(boot), filepath.Base(dir) == paths.Forked, -time.Hour, d.w.late
	d.w.machines[m.Dir] = b
	return &running{w: d.w, b: b}, nil
}

func (b *body) Quiesce(ctx context.Context, r *agentv1.QuiesceRequest) (*agentv1.QuiesceResponse, error) {
	if err := b.w.point(ctx, "quiesce"); err != nil {
		return nil, err
	}
	b.hold(r.GetHold())
	b.w.mu.Lock()
	defer b.w.mu.Unlock()
	return &agentv1.QuiesceResponse{Lacking: b.lacking}, nil
}

func (b *body) Adopt(ctx context.Context, r *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error) {
	if err := b.breaks(); err != nil {
		return nil, err
	}
	if b.clock().Abs() > guest.ClockExact || len(r.GetEntropy()) < 32 || (r.GetIdentity() != nil) != b.other {
		return nil, errors.New("told nonsense, or too early")
	}
	if b.hold(false) {
		return &agentv1.AdoptResponse{}, nil
	}
	return &agentv1.AdoptResponse{Late: b.late}, b.w.point(ctx, "adopt")
}

func (b *body) SetTime(ctx context.Context, r *agentv1.SetTimeRequest) (*agentv1.SetTimeResponse, error) {
	if err := b.breaks(); err != nil {
		return nil, err
	}
	if r.GetUnixNanos() != 0 {
		return nil, errors.New("told a time, which has become old")
	}
	return &agentv1.SetTimeResponse{StepNanos: r.GetStepNanos(), UnixNanos: b.setClock(b.clock() + time.Duration(r.GetStepNanos()))}, nil
}

// breaks is the end of a stream, as often as broken says.
func (b *body) breaks() error {
	b.w.mu.Lock()
	defer b.w.mu.Unlock()
	if b.broken == 0 {
		return nil
	}
	b.broken--
	return connect.NewError(connect.CodeUnavailable, errors.New("the stream was reset"))
}

// hold makes programs stand still, or go on, and tells whether they stood still.
func (b *body) hold(still bool) (before bool) {
	b.w.mu.Lock()
	defer b.w.mu.Unlock()
	before, b.held = b.held, still
	return before
}

// clock is how far the guest's clock is ahead.
func (b *body) clock() time.Duration {
	b.w.mu.Lock()
	defer b.w.mu.Unlock()
	return b.ahead
}

func (b *body) setClock(ahead time.Duration) (unixNanos int64) {
	b.w.mu.Lock()
	defer b.w.mu.Unlock()
	b.ahead = ahead
	return time.Now().Add(ahead).UnixNano()
}

// memoryFits checks that there is saved memory of suspended VMs, and of no others, and nothing half written.
func (b *bench) memoryFits(v vm.VM, when string) {
	b.t.Helper()
	if v.ID == "" {
		return
	}
	dir := b.p.VM(v.ID)
	if _, err := os.Stat(filepath.Join(dir, paths.Suspended, paths.SuspendedDisk)); (err == nil) != (v.State == vm.Suspended) {
		b.t.Errorf("%s: VM is %s, its memory: %v", when, v.State, err)
	}
	if _, err := os.Stat(filepath.Join(dir, paths.SuspendedNew)); err == nil {
		b.t.Errorf("%s: half a memory was left", when)
	}
}

// suspended makes a VM and suspends it.
func (b *bench) suspended(name string) vm.VM {
	b.t.Helper()
	v := b.create(name)
	for _, disk := range ownDisks {
		if err := os.WriteFile(filepath.Join(b.p.VM(v.ID), disk), []byte("disk"), 0o600); err != nil {
			b.t.Fatal(err)
		}
	}
	v, err := b.Suspend(b.t.Context(), name, nil)
	if err != nil {
		b.t.Fatalf("suspend %s: %v", name, err)
	}
	return v
}

// holds checks state, host and memory at once.
func (b *bench) holds(when string, state vm.State) vm.VM {
	b.t.Helper()
	v, err := b.Get(b.t.Context(), "web")
	if err != nil || v.State != state {
		b.t.Fatalf("%s: VM is %s (%s), %v; want %s", when, v.State, v.Reason, err, state)
	}
	want := down(v.ID)
	if state == vm.Running {
		want = up(v.ID)
		b.clockIsRight(when, v)
	}
	if s := b.w.String(); s != want {
		b.t.Fatalf("%s: VM is %s, host is\n%s\nwant\n%s", when, state, s, want)
	}
	b.memoryFits(v, when)
	return v
}

func (b *bench) clockIsRight(when string, v vm.VM) {
	b.t.Helper()
	body := b.w.body(v.ID)
	if body == nil {
		b.t.Errorf("%s: %s has no machine", when, v.Spec.Name)
	} else if ahead := body.clock(); ahead.Abs() > guest.ClockExact {
		b.t.Errorf("%s: the clock of %s is %v ahead", when, v.Spec.Name, ahead)
	} else if body.hold(false) && !strings.HasSuffix(when, "after quiesce") { // then it lets them go by itself
		b.t.Errorf("%s: the programs of %s stand still", when, v.Spec.Name)
	}
}

func (b *bench) resume(ctx context.Context) error {
	_, err := b.Resume(ctx, "web", nil)
	return err
}

func (b *bench) suspend(ctx context.Context) error {
	_, err := b.Suspend(ctx, "web", nil)
	return err
}

func TestSuspendAndResume(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	var told []string
	sink := progress.Sink(func(e progress.Event) {
		if e.Status == progress.Done {
			told = append(told, e.Stage)
		}
	})
	first := b.create("web")
	boot := b.w.body(first.ID).boot
	v, err := b.Suspend(ctx, "web", sink)
	if err != nil || v.State != vm.Suspended || v.Handle != nil || !v.StartedAt.IsZero() || v.IP != first.IP {
		t.Fatalf("%+v, %v", v, err)
	}
	if want := []string{"check", "record", "quiesce", "pause", "save", "release", "keys", "net", "disk", "done"}; !slices.Equal(told, want) {
		t.Errorf("stages of suspend %v, want %v", told, want)
	}
	b.holds("suspended", vm.Suspended)
	if _, err := b.Suspend(ctx, "web", nil); err != nil {
		t.Errorf("second suspend: %v", err)
	}
	if _, err := b.Agent(ctx, "web"); fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "vm resume web") {
		t.Errorf("agent of a suspended VM: %v, hint %q", err, fault.HintOf(err))
	}
	told = nil
	if v, err = b.Resume(ctx, "web", sink); err != nil || v.State != vm.Running || v.StartedAt.IsZero() || v.Handle == nil || v.MAC != first.MAC {
		t.Fatalf("%+v, %v", v, err)
	}
	if want := []string{"check", "record", "disk", "net", "keys", "load", "identity", "ready"}; !slices.Equal(told, want) {
		t.Errorf("stages of resume %v, want %v", told, want)
	}
	b.holds("resumed", vm.Running)
	if got := b.w.body(first.ID).boot; got != boot {
		t.Errorf("the guest is of boot %s, was of %s", got, boot)
	}
	if err := b.resume(ctx); fault.KindOf(err) != fault.Conflict {
		t.Errorf("resume of a running VM: %v", err)
	}
	// Start resumes as well, and the next life may be suspended again.
	if err := b.suspend(ctx); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Start(ctx, "web", nil); err != nil || b.w.body(first.ID).boot != boot {
		t.Errorf("start of a suspended VM: %v", err)
	}
	b.w.body(first.ID).die(vmm.ExitCrash, "later") // and it is watched
	b.expect("web", vm.Failed)
}

func TestWhatCannotBeSuspended(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	if err := b.suspend(ctx); fault.KindOf(err) != fault.NotFound {
		t.Errorf("no VM: %v", err)
	}
	v, err := b.Create(ctx, spec("web"), false, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, verb := range map[string]func(context.Context) error{"suspend": b.suspend, "resume": b.resume} {
		if err := verb(ctx); fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" || !strings.Contains(err.Error(), "VM web") {
			t.Errorf("%s of a stopped VM: %v, hint %q", name, err, fault.HintOf(err))
		}
	}
	v.State = vm.Paused
	if err := b.store.Save(ctx, v); err != nil {
		t.Fatal(err)
	}
	if err := b.suspend(ctx); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a paused VM: %v", err)
	}
	v.State = vm.Stopped
	if err := b.store.Save(ctx, v); err != nil {
		t.Fatal(err)
	}
	s := spec("short")
	s.Ephemeral = true
	if _, err := b.Create(ctx, s, true, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Suspend(ctx, "short", nil); fault.KindOf(err) != fault.Conflict {
		t.Errorf("an ephemeral VM: %v", err)
	}
	s = spec("large")
	s.MemoryBytes = 1 << 60 // more than any disk has room for
	b.c.Limits.MemoryBytes = 1 << 61
	if _, err := b.Create(ctx, s, true, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Suspend(ctx, "large", nil); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("no room: %v", err)
	}
	if got, _ := b.Get(ctx, "large"); got.State != vm.Running {
		t.Errorf("it is %s", got.State)
	}
}

// A suspend that fails before the memory is saved leaves the VM running; after that it is suspended, and the
// next verb finishes what was left.
func TestSuspendFailsAtEachStep(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	v := b.create("web")
	boot := b.w.body(v.ID).boot
	b.w.arm(nil)
	if err := b.suspend(ctx); err != nil {
		t.Fatal(err)
	}
	points := b.w.points()
	if err := b.resume(ctx); err != nil {
		t.Fatal(err)
	}
	if len(points) < 7 {
		t.Fatalf("points %q", points)
	}
	for _, o := range occurrences(points) {
		b.w.arm(failAt(o.point, o.n, errInjected))
		err := b.suspend(ctx)
		b.w.arm(nil)
		if err == nil || !strings.Contains(err.Error(), "injected") {
			t.Errorf("%s: got %v", o.point, err)
		}
		if o.point == "quiesce" || o.point == "pause" || o.point == "save" {
			b.holds("suspend failing at "+o.point, vm.Running)
			continue
		}
		if err := b.suspend(ctx); err != nil {
			t.Errorf("again after %s: %v", o.point, err)
		}
		b.holds("suspend failing at "+o.point, vm.Suspended)
		if err := b.resume(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if got := b.w.body(v.ID).boot; got != boot {
		t.Errorf("the guest was booted on the way: %s, was %s", got, boot)
	}
}

// A suspend that is cancelled before the memory is saved leaves the VM running, later it goes on.
func TestSuspendCancelledAtEachStage(t *testing.T) {
	b := newBench(t)
	v := b.create("web")
	for stage, want := range map[string]vm.State{
		"check": vm.Running, "record": vm.Running, "quiesce": vm.Running, "pause": vm.Running,
		"save": vm.Suspended, "release": vm.Suspended, "net": vm.Suspended,
	} {
		ctx, cancel := context.WithCancel(t.Context())
		b.hook = func(operation, reached string) {
			if reached == stage && operation == "suspend" {
				cancel()
			}
		}
		err := b.suspend(ctx)
		cancel()
		b.hook = nil
		if (err == nil) != (want == vm.Suspended) {
			t.Errorf("%s: %v", stage, err)
		}
		b.holds("suspend cancelled after "+stage, want)
		if _, err := b.Start(t.Context(), "web", nil); err != nil || b.w.body(v.ID).boot != "101" {
			t.Errorf("%s: start: %v", stage, err)
		}
	}
}

func TestGuestThatHangsAtQuiesce(t *testing.T) {
	b := newBench(t)
	v := b.forkable("web")
	b.c.QuiesceTimeout = 50 * time.Millisecond
	for name, verb := range map[string]func(context.Context) error{
		"suspend": b.suspend, "snapshot": b.Engine.snapFor, "fork": func(ctx context.Context) error { return b.fork(ctx, 2) },
	} {
		b.w.arm(hangAt("quiesce"))
		err := verb(t.Context())
		b.w.arm(nil)
		if fault.KindOf(err) != fault.Timeout || !strings.Contains(err.Error(), "runs on") || fault.HintOf(err) == "" {
			t.Errorf("%s: %v", name, err)
		}
		if strings.Contains(err.Error(), "suspend") && name != "suspend" {
			t.Errorf("%s tells of a suspend: %v", name, err)
		}
		b.only(name, v)
		b.snapshotsAre(v, name, "")
	}
}

func hangAt(point string) func(context.Context, string) error {
	return func(ctx context.Context, reached string) error {
		if reached == point {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	}
}

// A template whose guest never comes to rest is given up after its time, and nothing of it is left.
func TestTemplateThatHangsAtQuiesce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		b.c.Templates.Store = template.Open(b.p.Templates())
		b.w.arm(hangAt("quiesce"))
		begin := time.Now()
		_, err := b.WarmTemplate(t.Context(), spec("any"), nil)
		if took := time.Since(begin); fault.KindOf(err) != fault.Timeout || fault.HintOf(err) == "" || took > settleTimeout+time.Second {
			t.Errorf("after %v: %v, hint %q", took, err, fault.HintOf(err))
		}
		b.w.arm(nil)
		b.w.mu.Lock()
		for dir, body := range b.w.machines {
			if !body.ended() {
				t.Errorf("a machine runs in %s", dir)
			}
		}
		b.w.mu.Unlock()
		if left, err := filepath.Glob(filepath.Join(b.p.Templates(), ".new-*")); len(left) > 0 {
			t.Errorf("left %v, %v", left, err)
		}
		b.finish()
	})
}

// The way back fails as well: the next verb tries it again, and a VMM that cannot let its guest go on ends.
func TestSuspendWhoseWayBackFails(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	v := b.create("web")
	broken := func(times int) func(context.Context, string) error {
		return func(_ context.Context, point string) error {
			if point == "save" || point == "go on" && times > 0 {
				if point == "go on" {
					times--
				}
				return errInjected
			}
			return nil
		}
	}
	b.w.arm(broken(1))
	if err := b.suspend(ctx); !errors.Is(err, errInjected) {
		t.Errorf("got %v", err)
	}
	if got, _ := b.Get(ctx, "web"); got.State != vm.Suspending {
		t.Errorf("VM is %s", got.State)
	}
	b.w.arm(nil)
	if _, err := b.Start(ctx, "web", nil); err != nil {
		t.Errorf("the next verb: %v", err)
	}
	b.holds("mended", vm.Running)

	b.w.arm(broken(2))
	if err := b.suspend(ctx); !errors.Is(err, errInjected) {
		t.Errorf("got %v", err)
	}
	if _, err := b.Stop(ctx, "web", true, nil); err == nil {
		t.Error("nothing was told")
	}
	b.w.arm(nil)
	if got := b.holds("ended", vm.Failed); got.Reason == "" {
		t.Error("no reason")
	}

	if _, err := b.Start(ctx, "web", nil); err != nil {
		t.Fatal(err)
	}
	b.w.arm(broken(1))
	if err := b.suspend(ctx); err == nil {
		t.Error("no error")
	}
	b.w.arm(nil)
	b.w.body(v.ID).die(vmm.ExitCrash, "because") // its watcher knows what to do
	b.expect("web", vm.Failed)
}

func TestMachineThatDiesWhileItIsSaved(t *testing.T) {
	for _, point := range []string{"quiesce", "pause", "save"} {
		b := newBench(t)
		v := b.create("web")
		b.w.arm(func(_ context.Context, reached string) error {
			if reached == point {
				b.w.body(v.ID).die(vmm.ExitKilled, "because")
				return errors.New("it hung up")
			}
			return nil
		})
		if err := b.suspend(t.Context()); err == nil {
			t.Errorf("%s: no error", point)
		}
		b.w.arm(nil)
		if got := b.expect("web", vm.Failed); !strings.Contains(got.Reason, "because") {
			t.Errorf("%s: reason %q", point, got.Reason)
		}
		if _, err := b.Start(t.Context(), "web", nil); err != nil { // waits for the take-down
			t.Error(err)
		}
		b.holds(point, vm.Running)
	}
}

// A resume that fails leaves the VM suspended as before, with the reason and the way out.
func TestResumeFailsAtEachStep(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	v := b.suspended("web")
	b.w.arm(nil)
	if err := b.resume(ctx); err != nil {
		t.Fatal(err)
	}
	points := b.w.points()
	boot := b.w.body(v.ID).boot
	if err := b.suspend(ctx); err != nil {
		t.Fatal(err)
	}
	for _, o := range occurrences(points) {
		b.w.arm(failAt(o.point, o.n, errInjected))
		err := b.resume(ctx)
		b.w.arm(nil)
		if err == nil || !strings.Contains(err.Error(), "injected") || !strings.Contains(fault.HintOf(err), "vm start web --cold") {
			t.Errorf("%s: got %v, hint %q", o.point, err, fault.HintOf(err))
		}
		got := b.holds("resume failing at "+o.point, vm.Suspended)
		if begun := !strings.HasPrefix(o.point, "check ") || o.point == "check saved"; begun != strings.Contains(got.Reason, "injected") {
			t.Errorf("%s: reason %q", o.point, got.Reason)
		}
	}
	if err := b.resume(ctx); err != nil || b.w.body(v.ID).boot != boot {
		t.Fatalf("resume after failures: %v", err)
	}
	if got := b.holds("resumed", vm.Running); got.Reason != "" {
		t.Errorf("reason %q", got.Reason)
	}
}

func TestResumeCancelledAtEachStage(t *testing.T) {
	b := newBench(t)
	v := b.suspended("web")
	for _, stage := range []string{"check", "record", "disk", "net", "machine", "load", "identity"} {
		ctx, cancel := context.WithCancel(t.Context())
		b.hook = func(operation, reached string) {
			if reached == stage && operation == "resume" {
				cancel()
			}
		}
		err := b.resume(ctx)
		cancel()
		b.hook = nil
		if fault.ExitCode(err) != 130 {
			t.Errorf("%s: %v", stage, err)
		}
		if got := b.holds("resume cancelled after "+stage, vm.Suspended); got.Reason != "" {
			t.Errorf("%s: reason %q", stage, got.Reason)
		}
	}
	if err := b.resume(t.Context()); err != nil || b.w.body(v.ID).boot != "101" {
		t.Error(err)
	}
}

// What other verbs do with a VM whose memory is saved.
func TestVerbsOnASuspendedVM(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	var notices []string
	sink := progress.Sink(func(e progress.Event) {
		if e.Status == progress.Notice {
			notices = append(notices, e.Message)
		}
	})
	for name, c := range map[string]struct {
		verb func() error
		want vm.State
	}{
		"stop":    {func() error { _, err := b.Stop(ctx, "web", false, sink); return err }, vm.Stopped},
		"kill":    {func() error { _, err := b.Stop(ctx, "web", true, sink); return err }, vm.Stopped},
		"boot":    {func() error { _, err := b.Boot(ctx, "web", sink); return err }, vm.Running},
		"restart": {func() error { _, err := b.Restart(ctx, "web", sink); return err }, vm.Running},
	} {
		v := b.suspended("web")
		notices = nil
		if err := c.verb(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		b.holds(name, c.want)
		if len(notices) != 1 || !strings.Contains(notices[0], "saved memory") {
			t.Errorf("%s told %q", name, notices)
		}
		if body := b.w.body(v.ID); body != nil && body.boot == "101" {
			t.Errorf("%s resumed", name)
		}
		if err := b.Delete(ctx, "web", true, nil); err != nil {
			t.Fatal(err)
		}
		b.nothingLeft(name)
	}
	b.suspended("web")
	if err := b.Delete(ctx, "web", false, nil); err != nil {
		t.Error(err)
	}
	b.nothingLeft("delete")
}

// A guest whose disks were written to since goes on with nothing: that would damage them.
func TestDisksThatChangedSince(t *testing.T) {
	for name, change := range map[string]func(dir string) error{
		"written": func(dir string) error {
			return os.Chtimes(filepath.Join(dir, paths.WorkDisk), time.Time{}, time.Unix(1, 0))
		},
		"grown": func(dir string) error { return os.Truncate(filepath.Join(dir, paths.OverlayDisk), 4096) },
		"gone":  func(dir string) error { return os.Remove(filepath.Join(dir, paths.WorkDisk)) },
		"damaged": func(dir string) error {
			return os.Truncate(filepath.Join(dir, paths.Suspended, paths.SuspendedDisk), 3)
		},
		"no state":  func(dir string) error { return os.Remove(filepath.Join(dir, paths.Suspended, vmm.SavedState)) },
		"no memory": func(dir string) error { return os.RemoveAll(filepath.Join(dir, paths.Suspended)) },
	} {
		b := newBench(t)
		v := b.suspended("web")
		if err := change(b.p.VM(v.ID)); err != nil {
			t.Fatal(err)
		}
		err := b.resume(t.Context())
		if fault.KindOf(err) != fault.Precondition || !strings.Contains(fault.HintOf(err), "--cold") {
			t.Errorf("%s: %v, hint %q", name, err, fault.HintOf(err))
		}
		if _, err := b.Boot(t.Context(), "web", nil); err != nil {
			t.Errorf("%s: cold: %v", name, err)
		}
		b.holds(name, vm.Running)
	}
}

// A daemon that died between the memory's name and the row, with a machine that is still there or not.
func TestSavedMemoryWithoutItsRow(t *testing.T) {
	for _, lives := range []bool{true, false} {
		b := newBench(t)
		v := b.create("web")
		reached, release := make(chan struct{}), make(chan struct{})
		b.hook = func(_, stage string) {
			if stage == stagePause {
				close(reached)
				<-release
			}
		}
		ended := make(chan error, 1)
		go func() { ended <- b.suspend(context.Background()) }()
		<-reached
		dead := b.Engine
		dead.die()
		b.hook = nil
		memory := filepath.Join(b.p.VM(v.ID), paths.Suspended)
		if err := errors.Join(os.Mkdir(memory, 0o700), os.WriteFile(filepath.Join(memory, paths.SuspendedDisk), []byte("{}"), 0o600),
			os.WriteFile(filepath.Join(memory, vmm.SavedState), []byte("101"), 0o600)); err != nil {
			t.Fatal(err)
		}
		if !lives {
			b.w.body(v.ID).die(vmm.ExitKilled, "")
		}
		b.reborn()
		told, err := b.Reconcile(t.Context())
		if err != nil || len(told) != 1 {
			t.Errorf("mended %q, %v", told, err)
		}
		want := vm.Suspended
		if lives {
			want = vm.Running
		}
		b.holds("reconciled", want)
		if !lives {
			if err := b.resume(t.Context()); err != nil || b.w.body(v.ID).boot != "101" {
				t.Errorf("resume: %v", err)
			}
		}
		b.w.arm(func(context.Context, string) error { return errInjected })
		_ = dead.c.Store.Close()
		close(release)
		<-ended
	}
}

func TestSuspendedOverAHostRestart(t *testing.T) {
	b := newBench(t)
	if _, err := b.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	v := b.suspended("web")
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b.boot = "second"
	b.reborn()
	if told, err := b.Reconcile(t.Context()); err != nil || len(told) > 0 {
		t.Errorf("mended %q, %v", told, err)
	}
	b.holds("after the restart", vm.Suspended)
	if err := b.resume(t.Context()); err != nil || b.w.body(v.ID).boot != "101" {
		t.Error(err)
	}
}

// A stop that comes while the memory is written is a stop.
func TestStopWhileSuspending(t *testing.T) {
	b := newBench(t)
	b.create("web")
	saving := make(chan struct{})
	b.w.arm(func(ctx context.Context, point string) error {
		if point == "save" {
			close(saving)
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	ended := make(chan error, 1)
	go func() { ended <- b.suspend(context.Background()) }()
	<-saving
	if err := b.Delete(t.Context(), "web", false, nil); fault.KindOf(err) != fault.Conflict {
		t.Errorf("delete without force: %v", err)
	}
	if _, err := b.Stop(t.Context(), "web", false, nil); err != nil {
		t.Error(err)
	}
	if err := <-ended; fault.KindOf(err) != fault.Conflict {
		t.Errorf("the suspend ended with %v", err)
	}
	b.holds("stopped", vm.Stopped)
}

// A guest that was loaded when the daemon died goes on; one that does not is taken back, and its memory stays.
func TestDeathAfterTheLoad(t *testing.T) {
	for _, stage := range []string{stageMachine, stageLoad, stageIdentity} {
		for _, answers := range []bool{true, false} {
			b := newBench(t)
			v := b.suspended("web")
			reached, release := make(chan struct{}), make(chan struct{})
			b.hook = func(operation, ended string) {
				if operation == "resume" && ended == stage {
					close(reached)
					<-release
				}
			}
			ended := make(chan error, 1)
			go func() { ended <- b.resume(context.Background()) }()
			<-reached
			dead := b.Engine
			dead.die()
			b.hook = nil
			b.reborn()
			want := vm.Running
			if !answers {
				b.w.arm(failAt("adopt", 1, errInjected))
				want = vm.Suspended
			}
			told, err := b.Reconcile(t.Context())
			if err != nil || len(told) != 1 {
				t.Errorf("%s: mended %q, %v", stage, told, err)
			}
			b.w.arm(nil)
			got := b.holds("dead after "+stage, want)
			if (got.Handle != nil) != answers || (got.Reason == "") != answers {
				t.Errorf("%s: handle %s, reason %q", stage, got.Handle, got.Reason)
			}
			if _, err := b.Start(t.Context(), "web", nil); err != nil || b.w.body(v.ID).boot != "101" {
				t.Errorf("%s: %v", stage, err)
			}
			b.w.arm(func(context.Context, string) error { return errInjected })
			_ = dead.c.Store.Close()
			close(release)
			<-ended
			b.w.arm(nil)
		}
	}
}
