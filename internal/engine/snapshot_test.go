package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/snapshot"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// write gives the VM a work disk with that on it; of a VM that runs, as its guest would.
func (b *bench) write(v vm.VM, text string) {
	b.t.Helper()
	if err := os.WriteFile(filepath.Join(b.p.VM(v.ID), paths.WorkDisk), []byte(text), 0o600); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) written(v vm.VM) string {
	text, err := os.ReadFile(filepath.Join(b.p.VM(v.ID), paths.WorkDisk))
	if err != nil {
		b.t.Fatal(err)
	}
	return string(text)
}

func (b *bench) snap(ctx context.Context, tag string) error {
	_, err := b.CreateSnapshot(ctx, "web", SnapshotOptions{Tag: tag}, nil)
	return err
}

func (b *bench) back(ctx context.Context) error {
	_, err := b.RestoreSnapshot(ctx, "web", "v1", RestoreOptions{Running: true}, nil)
	return err
}

// snapshotsAre checks that there are these snapshots and nothing half made.
func (b *bench) snapshotsAre(v vm.VM, when, want string) {
	b.t.Helper()
	entries, err := os.ReadDir(filepath.Join(b.p.VM(v.ID), paths.Snapshots))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		b.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	if got := strings.Join(names, " "); got != want {
		b.t.Errorf("%s: snapshots are %q, want %q", when, got, want)
	}
	if _, err := os.Stat(filepath.Join(b.p.VM(v.ID), paths.RevertNew)); err == nil {
		b.t.Errorf("%s: half a restore was left", when)
	}
}

// killedAfter has the daemon die after a stage of what f does, and looks at what the next one finds.
func (b *bench) killedAfter(operation, stage string, f func(context.Context) error, look func(told []string)) {
	b.t.Helper()
	reached, release, ended := make(chan struct{}), make(chan struct{}), make(chan error, 1)
	b.hook = func(o, s string) {
		if o == operation && s == stage {
			b.hook = nil
			close(reached)
			<-release
		}
	}
	go func() { ended <- f(context.Background()) }()
	select {
	case <-reached:
	case err := <-ended:
		b.t.Fatalf("%s: there is no such stage: %v", stage, err)
	}
	dead := b.Engine
	dead.die()
	b.reborn()
	told, err := b.Reconcile(b.t.Context())
	if err != nil {
		b.t.Errorf("killed after %s: %v", stage, err)
	}
	look(told)
	b.w.arm(func(context.Context, string) error { return errInjected })
	_ = dead.c.Store.Close()
	close(release)
	<-ended
	b.w.arm(nil)
}

// Whatever fails while a snapshot is made, the VM runs on and there is no half snapshot.
// A VMM may reset all streams of a machine that it saved: nobody hears of it, and the guest's programs run on.
func TestSnapshotThatResetsStreams(t *testing.T) {
	b := newBench(t)
	v := b.forkable("web")
	body := b.w.body(v.ID)
	for broken := 1; broken <= 3; broken++ {
		b.w.mu.Lock()
		body.broken = broken
		b.w.mu.Unlock()
		var told []string
		if _, err := b.CreateSnapshot(t.Context(), "web", SnapshotOptions{}, func(e progress.Event) {
			if e.Status == progress.Notice {
				told = append(told, e.Message)
			}
		}); err != nil {
			t.Fatal(err)
		}
		if got := strings.Join(told, ""); got != "" {
			t.Errorf("%d streams reset: told %q", broken, got)
		}
		b.clockIsRight("saved", v)
		if body.hold(false) {
			t.Errorf("%d streams reset: programs stand still", broken)
		}
	}
}

func TestSnapshotFailsAtEachStep(t *testing.T) {
	b := newBench(t)
	v := b.create("web")
	b.write(v, "first")
	for _, point := range []string{"quiesce", "pause", "save"} {
		b.w.arm(failAt(point, 1, errInjected))
		if err := b.snap(t.Context(), "v1"); err == nil || !strings.Contains(err.Error(), "injected") {
			t.Errorf("%s: %v", point, err)
		}
		b.w.arm(nil)
		b.holds(point, vm.Running)
		b.snapshotsAre(v, point, "")
	}
	for _, stage := range []string{"check", "quiesce", "record", "pause"} {
		ctx, cancel := context.WithCancel(t.Context())
		b.hook = func(operation, reached string) {
			if operation == "snapshot" && reached == stage {
				cancel()
			}
		}
		err := b.snap(ctx, "v1")
		cancel()
		b.hook = nil
		if fault.ExitCode(err) != 130 {
			t.Errorf("cancelled after %s: %v", stage, err)
		}
		b.holds("cancelled after "+stage, vm.Running)
		b.snapshotsAre(v, "cancelled after "+stage, "")
	}
	// A guest that does not go on is let go on by whoever comes next.
	b.w.arm(failAt("go on", 1, errInjected))
	if err := b.snap(t.Context(), "v1"); err == nil {
		t.Error("nothing was told")
	}
	b.w.arm(nil)
	b.snapshotsAre(v, "stuck", "")
	if err := b.snap(t.Context(), "v1"); err != nil {
		t.Errorf("the next one: %v", err)
	}
	b.holds("mended", vm.Running)
	b.snapshotsAre(v, "mended", "v1")
}

func TestDaemonKilledAtEachStageOfASnapshot(t *testing.T) {
	for _, stage := range []string{"check", "quiesce", "record", "pause", "save", "go on", "keep"} {
		b := newBench(t)
		v := b.create("web")
		b.write(v, "first")
		b.killedAfter("snapshot", stage, func(ctx context.Context) error { return b.Engine.snapFor(ctx) }, func([]string) {
			b.holds("killed after "+stage, vm.Running)
			want := ""
			if stage == "keep" {
				want = "v1"
			}
			b.snapshotsAre(v, "killed after "+stage, want)
		})
	}
}

func (e *Engine) snapFor(ctx context.Context) error {
	_, err := e.CreateSnapshot(ctx, "web", SnapshotOptions{Tag: "v1"}, nil)
	return err
}

// copied is a VM that was put into a snapshot and went on.
func (b *bench) copied() (v vm.VM, boot string) {
	b.t.Helper()
	v = b.create("web")
	b.write(v, "first")
	boot = b.w.body(v.ID).boot
	if err := b.snap(b.t.Context(), "v1"); err != nil {
		b.t.Fatal(err)
	}
	if _, err := b.Restart(b.t.Context(), "web", nil); err != nil {
		b.t.Fatal(err)
	}
	b.write(v, "second")
	return v, boot
}

func TestRestoreFromEachState(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	v, boot := b.copied()
	for name, before := range map[string]func() error{
		"running":   func() error { _, err := b.Boot(ctx, "web", nil); return err },
		"stopped":   func() error { _, err := b.Stop(ctx, "web", true, nil); return err },
		"suspended": func() error { return b.suspend(ctx) },
		"failed": func() error {
			b.w.body(v.ID).die(vmm.ExitCrash, "because")
			b.expect("web", vm.Failed)
			return nil
		},
	} {
		if _, err := b.Start(ctx, "web", nil); err != nil {
			t.Fatal(err)
		}
		if err := before(); err != nil {
			t.Fatal(err)
		}
		b.write(v, "second")
		if err := b.back(ctx); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		b.holds(name, vm.Running)
		b.snapshotsAre(v, name, "v1")
		if got := b.written(v); got != "first" || b.w.body(v.ID).boot != boot {
			t.Errorf("%s: %q is on the disk, the guest is of boot %s", name, got, b.w.body(v.ID).boot)
		}
	}
	if _, err := b.RestoreSnapshot(ctx, "web", "v1", RestoreOptions{}, nil); fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "--yes") {
		t.Errorf("one that runs: %v", err)
	}
	if _, err := b.RestoreSnapshot(ctx, "web", "v1", RestoreOptions{Running: true, DisksOnly: true}, nil); err != nil {
		t.Error(err)
	}
	b.holds("disks only", vm.Stopped)
}

// Before the intent row the VM is as it was, after it it goes back, whoever finishes that.
func TestDaemonKilledAtEachStageOfARestore(t *testing.T) {
	for _, stage := range []string{"check", "copy disks", "record", "release", "keys", "net", "disk", "swap disks", "done"} {
		b := newBench(t)
		v, boot := b.copied()
		before := stage == "check" || stage == "copy disks"
		b.killedAfter("restore", stage, b.Engine.backFor, func(told []string) {
			state, disk := vm.Suspended, "first"
			if before {
				state, disk = vm.Running, "second"
			}
			b.holds("killed after "+stage, state)
			b.snapshotsAre(v, "killed after "+stage, "v1")
			if got := b.written(v); got != disk {
				t.Errorf("killed after %s: %q is on the disk", stage, got)
			}
			if intent := !before && stage != "done"; (len(told) == 1) != intent {
				t.Errorf("killed after %s: told %q", stage, told)
			}
			if before {
				return
			}
			if err := b.resume(t.Context()); err != nil || b.w.body(v.ID).boot != boot {
				t.Errorf("killed after %s: %v", stage, err)
			}
		})
	}
}

func (e *Engine) backFor(ctx context.Context) error {
	_, err := e.RestoreSnapshot(ctx, "web", "v1", RestoreOptions{Running: true}, nil)
	return err
}

// A restore that fails is finished by the next verb; one that does not load leaves the VM suspended.
func TestRestoreFailsAtEachStep(t *testing.T) {
	for _, point := range []string{"check disk", "driver stop", "down net", "up disk", "check saved", "restore", "adopt"} {
		b := newBench(t)
		v, boot := b.copied()
		b.w.arm(failAt(point, 1, errInjected))
		err := b.back(t.Context())
		b.w.arm(nil)
		if err == nil || !strings.Contains(err.Error(), "injected") {
			t.Errorf("%s: %v", point, err)
		}
		disk := "first"
		if point == "check disk" {
			disk = "second"
			b.holds(point, vm.Running)
		} else if _, err := b.Start(t.Context(), "web", nil); err != nil || b.w.body(v.ID).boot != boot {
			t.Errorf("%s: start: %v", point, err)
		}
		b.holds(point, vm.Running)
		b.snapshotsAre(v, point, "v1")
		if got := b.written(v); got != disk {
			t.Errorf("%s: %q is on the disk", point, got)
		}
	}
}

func TestSnapshotsGoWithTheirVM(t *testing.T) {
	b := newBench(t)
	v, _ := b.copied()
	if err := b.DeleteSnapshot(t.Context(), "web", "v2"); fault.KindOf(err) != fault.NotFound {
		t.Error(err)
	}
	if all, err := b.Snapshots(t.Context(), "web"); err != nil || len(all) != 1 || all[0].Kind != snapshot.Memory || all[0].PausedFor <= 0 || all[0].RealBytes <= 0 {
		t.Errorf("%+v, %v", all, err)
	}
	if err := b.snap(t.Context(), "v1"); fault.KindOf(err) != fault.Conflict {
		t.Error(err)
	}
	if err := b.DeleteSnapshot(t.Context(), "web", "v1"); err != nil {
		t.Error(err)
	}
	b.snapshotsAre(v, "deleted", "")
	if err := b.snap(t.Context(), ""); err != nil {
		t.Error(err)
	}
	if err := b.Delete(t.Context(), "web", true, nil); err != nil {
		t.Error(err)
	}
	b.nothingLeft("deleted")
}
