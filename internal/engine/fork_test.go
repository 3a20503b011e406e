package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// forkable makes a VM with disks.
func (b *bench) forkable(name string) vm.VM {
	b.t.Helper()
	v := b.create(name)
	for _, disk := range ownDisks {
		if err := os.WriteFile(filepath.Join(b.p.VM(v.ID), disk), []byte(name), 0o600); err != nil {
			b.t.Fatal(err)
		}
	}
	return v
}

func (b *bench) fork(ctx context.Context, count int) error {
	_, err := b.Fork(ctx, "web", ForkOptions{Name: "kid", Count: count}, nil)
	return err
}

// only checks that there is the running VM, as it was, and nothing else.
func (b *bench) only(when string, v vm.VM) {
	b.t.Helper()
	all, err := b.List(context.Background())
	if err != nil || len(all) != 1 || all[0].State != vm.Running || all[0].ID != v.ID {
		b.t.Fatalf("%s: rows %+v, %v", when, all, err)
	}
	if s := b.w.String(); s != up(v.ID) {
		b.t.Fatalf("%s: host is\n%s\nwant\n%s", when, s, up(v.ID))
	}
	if dirs, err := os.ReadDir(b.p.VMs()); err != nil || len(dirs) != 1 {
		b.t.Fatalf("%s: files left: %v, %v", when, dirs, err)
	}
	if body := b.w.body(v.ID); body.boot != "101" {
		b.t.Fatalf("%s: the guest is of boot %s", when, body.boot)
	}
	b.clockIsRight(when, v)
}

func TestFork(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	source := b.forkable("web")
	done, err := b.Fork(ctx, "web", ForkOptions{Count: 3, Ephemeral: true}, nil)
	if err != nil || len(done.VMs) != 3 || done.Paused <= 0 {
		t.Fatalf("%+v, %v", done, err)
	}
	seen := map[string]bool{source.IP.String(): true}
	for i, v := range done.VMs {
		got, err := b.Get(ctx, v.Spec.Name)
		if err != nil || got.State != vm.Running || got.Creating || !got.Spec.Ephemeral || got.Spec.Name != "web-fork-"+string(rune('1'+i)) || seen[got.IP.String()] {
			t.Errorf("%+v, %v", got, err)
		}
		seen[got.IP.String()] = true
		b.clockIsRight("forked", v)
		if boot := b.w.body(v.ID).boot; boot != "101" {
			t.Errorf("%s is of boot %s", v.Spec.Name, boot)
		}
		if disk, err := os.ReadFile(filepath.Join(b.p.VM(v.ID), paths.WorkDisk)); string(disk) != "web" {
			t.Errorf("disk %q, %v", disk, err)
		}
		if _, err := os.Stat(filepath.Join(b.p.VM(v.ID), paths.Forked)); err == nil {
			t.Error("the memory is left")
		}
	}
	// Forks of forks; a name that is taken is passed over, or told.
	again, err := b.Fork(ctx, "web-fork-2", ForkOptions{}, nil)
	if err != nil || again.VMs[0].Spec.Name != "web-fork-2-fork-1" || again.VMs[0].Spec.Ephemeral {
		t.Errorf("%+v, %v", again, err)
	}
	if next, err := b.Fork(ctx, "web", ForkOptions{}, nil); err != nil || next.VMs[0].Spec.Name != "web-fork-4" {
		t.Errorf("%+v, %v", next, err)
	}
	if _, err := b.Fork(ctx, "web", ForkOptions{Name: "other", Count: 2}, nil); err != nil {
		t.Errorf("other names: %v", err)
	}
	if _, err := b.Fork(ctx, "web", ForkOptions{Name: "web-fork-2"}, nil); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a name that is taken: %v", err)
	}
	if _, err := b.Fork(ctx, "web", ForkOptions{Name: "Not_A_Name"}, nil); fault.KindOf(err) != fault.Usage {
		t.Errorf("no name: %v", err)
	}
	b.w.body(done.VMs[0].ID).die(vmm.ExitPowerOff, "later") // and it is watched, and ephemeral
	b.expect("web-fork-1", vm.Gone)
	all, err := b.List(ctx)
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range all {
		if err := b.Delete(ctx, string(v.ID), true, nil); err != nil {
			t.Error(err)
		}
	}
	b.nothingLeft("deleted")
}

// Programs that ran before they knew who they are: it is told.
func TestForkThatIsTooSlow(t *testing.T) {
	b := newBench(t)
	b.forkable("web")
	b.w.late = true
	var told strings.Builder
	_, err := b.Fork(t.Context(), "web", ForkOptions{Name: "kid"}, func(e progress.Event) { told.WriteString(e.Message) })
	if err != nil || !strings.Contains(told.String(), "programs of VM kid ran on before") {
		t.Errorf("told %q, %v", told.String(), err)
	}
}

func TestWhatCannotBeForked(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	if err := b.fork(ctx, 1); fault.KindOf(err) != fault.NotFound {
		t.Errorf("no VM: %v", err)
	}
	v, err := b.Create(ctx, spec("web"), false, nil)
	if err != nil {
		t.Fatal(err)
	}
	for state, hint := range map[vm.State]string{
		vm.Stopped: "vm clone web", vm.Failed: "vm clone web", vm.Suspended: "vm resume web",
		vm.Running: "vm clone web", // its machine is gone: it is found failed first
	} {
		v.State = state
		if err := b.store.Save(ctx, v); err != nil {
			t.Fatal(err)
		}
		if err := b.fork(ctx, 1); fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), hint) {
			t.Errorf("%s: %v, hint %q", state, err, fault.HintOf(err))
		}
	}
	if err := b.fork(ctx, MaxForks+1); fault.KindOf(err) != fault.Usage {
		t.Errorf("too many: %v", err)
	}
	v.State = vm.Stopped
	if err := b.store.Save(ctx, v); err != nil {
		t.Fatal(err)
	}
	s := spec("large")
	s.MemoryBytes, b.c.Limits.MemoryBytes = 1<<60, 1<<61
	if _, err := b.Create(ctx, s, true, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Fork(ctx, "large", ForkOptions{}, nil); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("no room: %v", err)
	}
}

// Whatever fails, for one child or for all, the source runs on and none of the children is left.
func TestForkFailsAtEachStep(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	v := b.forkable("web")
	b.w.arm(nil)
	if err := b.fork(ctx, 2); err != nil {
		t.Fatal(err)
	}
	points := b.w.points()
	for _, name := range []string{"kid", "kid-2"} {
		if err := b.Delete(ctx, name, true, nil); err != nil {
			t.Fatal(err)
		}
	}
	b.only("before", v)
	if !slices.Contains(points, "adopt") || len(points) < 15 {
		t.Fatalf("points %q", points)
	}
	for _, o := range occurrences(points) {
		b.w.arm(failAt(o.point, o.n, errInjected))
		err := b.fork(ctx, 2)
		b.w.arm(nil)
		if err == nil || !strings.Contains(err.Error(), "injected") {
			t.Errorf("%s: got %v", o.point, err)
		}
		if o.point == "go on" { // the next verb tries again
			if _, err := b.Start(ctx, "web", nil); err != nil {
				t.Error(err)
			}
		}
		b.only("fork failing at "+o.point, v)
	}
}

// stages counts those that a fork goes through.
func (b *bench) stages(count int) int {
	b.t.Helper()
	var mu sync.Mutex
	n := 0
	b.hook = func(operation, _ string) {
		mu.Lock()
		defer mu.Unlock()
		if operation == "fork" {
			n++
		}
	}
	if err := b.fork(b.t.Context(), count); err != nil {
		b.t.Fatal(err)
	}
	return n
}

func TestForkCancelledAfterEachStage(t *testing.T) {
	b := newBench(t)
	v := b.forkable("web")
	total := b.stages(1)
	b.hook = nil
	if err := b.Delete(t.Context(), "kid", true, nil); err != nil {
		t.Fatal(err)
	}
	for at := 1; at < total; at++ {
		ctx, cancel := context.WithCancel(t.Context())
		var mu sync.Mutex
		n, last := 0, ""
		b.hook = func(operation, stage string) {
			mu.Lock()
			defer mu.Unlock()
			if operation != "fork" {
				return
			}
			if n++; n == at {
				last = stage
				cancel()
			}
		}
		err := b.fork(ctx, 1)
		cancel()
		b.hook = nil
		if last == stageClock || last == stageMachine || last == stageLoad { // it may notice too late
			t.Logf("cancelled after %s: %v", last, err)
		}
		if fault.KindOf(err) != fault.Interrupted {
			t.Errorf("cancelled after %s: %v", last, err)
		}
		b.only("cancelled after "+last, v)
	}
}

// A daemon that dies leaves the source to be found running, and children that run already.
func TestDaemonDiesAfterEachStageOfAFork(t *testing.T) {
	b := newBench(t)
	b.forkable("web")
	total := b.stages(1)
	for at := 1; at <= total; at++ {
		b := newBench(t)
		v := b.forkable("web")
		reached, release := make(chan struct{}), make(chan struct{})
		n, last := 0, ""
		b.hook = func(operation, stage string) {
			if operation != "fork" {
				return
			}
			if n++; n == at {
				last = stage
				close(reached)
				<-release
			}
		}
		ended := make(chan error, 1)
		go func() { ended <- b.fork(context.Background(), 1) }()
		<-reached
		dead := b.Engine
		dead.die()
		b.reborn()
		if _, err := b.Reconcile(t.Context()); err != nil {
			t.Errorf("after %s: %v", last, err)
		}
		if kid, err := b.Get(t.Context(), "kid"); err == nil {
			if at < total || kid.State != vm.Running {
				t.Errorf("after %s: the child is %s", last, kid.State)
			}
			if _, err := os.Stat(filepath.Join(b.p.VM(kid.ID), paths.Forked)); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("the memory is left: %v", err)
			}
			if err := b.Delete(t.Context(), "kid", true, nil); err != nil {
				t.Error(err)
			}
		} else if at == total {
			t.Errorf("after %s: the child is gone", last)
		}
		b.only("reconciled after "+last, v)
		dead.end(errClosing)
		close(release)
		<-ended
	}
}

func TestClone(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	source := b.forkable("web")
	if _, err := b.Clone(ctx, "web", "", nil); fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "vm fork web") {
		t.Errorf("one that runs: %v", err)
	}
	if _, err := b.Stop(ctx, "web", true, nil); err != nil {
		t.Fatal(err)
	}
	before := b.w.String()
	made, err := b.Clone(ctx, "web", "", nil)
	if err != nil || made.Spec.Name != "web-clone-1" || made.State != vm.Stopped || made.Creating || made.IP == source.IP {
		t.Fatalf("%+v, %v", made, err)
	}
	if disk, err := os.ReadFile(filepath.Join(b.p.VM(made.ID), paths.OverlayDisk)); string(disk) != "web" {
		t.Errorf("disk %q, %v", disk, err)
	}
	if _, err := b.Clone(ctx, "web", "web-clone-1", nil); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a name that is taken: %v", err)
	}
	if _, err := b.Start(ctx, "web-clone-1", nil); err != nil {
		t.Error(err)
	}
	if err := b.Delete(ctx, "web-clone-1", true, nil); err != nil {
		t.Error(err)
	}
	// Cancelled, nothing is left.
	stopped, cancel := context.WithCancel(ctx)
	b.hook = func(operation, stage string) {
		if operation == "clone" && stage == stageRecord {
			cancel()
		}
	}
	if _, err := b.Clone(stopped, "web", "", nil); fault.KindOf(err) != fault.Interrupted {
		t.Errorf("cancelled: %v", err)
	}
	b.hook = nil
	if all, err := b.List(ctx); err != nil || len(all) != 1 || b.w.String() != before {
		t.Errorf("left: %+v, %v\n%s", all, err, b.w)
	}
}
