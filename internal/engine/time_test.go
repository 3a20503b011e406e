package engine

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"connectrpc.com/connect"
	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// A guest that ignores agent and power button is killed once its time is over, not before.
func TestStopLadderTakesItsTime(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*world)
		least time.Duration
		steps []string
	}{
		"deaf guest": {func(w *world) { w.deaf = true }, 200*time.Millisecond + buttonTimeout, []string{"shutdown", "button", "driver stop"}},
		"agent refuses": {
			func(w *world) { w.arm(failAt("shutdown", 1, errInjected)) }, 0, []string{"shutdown", "button", "driver stop"},
		},
		"no button either": {func(w *world) {
			w.deaf = true
			w.arm(failAt("button", 1, errInjected))
		}, 200 * time.Millisecond, []string{"shutdown", "button", "driver stop"}},
		"its answer is lost": {
			func(w *world) { w.hasty = 300 * time.Millisecond }, 300 * time.Millisecond, []string{"shutdown", "driver stop"},
		},
		"guest obeys": {func(*world) {}, 0, []string{"shutdown", "driver stop"}},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				b := newBench(t)
				v := b.create("web")
				b.w.arm(nil)
				c.spoil(b.w)
				begin := time.Now()
				if _, err := b.Stop(t.Context(), "web", false, nil); err != nil {
					t.Fatal(err)
				}
				took := time.Since(begin)
				if took < c.least || took > c.least+5*time.Second {
					t.Errorf("took %s, want %s", took, c.least)
				}
				got := slices.DeleteFunc(b.w.points(), func(p string) bool { return !slices.Contains([]string{"shutdown", "button", "driver stop"}, p) })
				if !slices.Equal(got, c.steps) {
					t.Errorf("steps %v, want %v", got, c.steps)
				}
				if s := b.w.String(); s != down(v.ID) {
					t.Errorf("left:\n%s", s)
				}
				b.finish()
			})
		})
	}
}

// Reboots that are far enough apart are no loop.
func TestSlowRebootsAreFine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		v := b.create("web")
		for range 3 * maxReboots {
			time.Sleep(rebootWindow / maxReboots)
			if !b.mayReboot(v.ID) {
				t.Fatal("taken for a loop")
			}
		}
		b.finish()
	})
}

// A disk that becomes full in the middle of a create leaves no row and no file.
func TestCreateOnAFullDisk(t *testing.T) {
	need.Root(t)
	b := newBench(t)
	small := t.TempDir()
	if err := unix.Mount("tmpfs", small, "tmpfs", 0, "size=1m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(small, unix.MNT_DETACH) })
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	b.p.State = small
	if err := b.p.Make(); err != nil {
		t.Fatal(err)
	}
	b.reborn()
	b.w.arm(func(_ context.Context, point string) error {
		if point != "up keys" {
			return nil
		}
		rows, err := b.List(context.Background())
		if err != nil || len(rows) != 1 {
			return errors.Join(err, errors.New("no row"))
		}
		full := os.WriteFile(filepath.Join(b.p.VM(rows[0].ID), "filler"), make([]byte, 2<<20), 0o600)
		return fault.Wrap(fault.Precondition, full, "no space")
	})
	_, err := b.Create(t.Context(), spec("web"), true, nil)
	if fault.KindOf(err) != fault.Precondition || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("got %v", err)
	}
	b.w.arm(nil)
	b.nothingLeft("create on a full disk")
	if v := b.create("web"); v.State != vm.Running { // and once there is room again
		t.Errorf("VM is %s", v.State)
	}
}

// Who reads that a VM runs may ask for its agent, also while its owner has not yet taken the machine; and who asks while
// its end is being written down hears of that.
func TestAgentWaitsForTheOwner(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		asked := make(chan error, 1)
		ask := func(at string) func(string, string) {
			return func(operation, stage string) {
				if operation+" "+stage != at {
					return
				}
				go func() { _, err := b.Agent(context.Background(), "web"); asked <- err }()
				synctest.Wait() // until it waits, or has its answer
			}
		}
		b.hook = ask("create ready")
		v := b.create("web")
		if err := <-asked; err != nil {
			t.Errorf("when the row said that it runs: %v", err)
		}
		b.hook = nil
		atEnd := func(_ context.Context, point string) error {
			if point == "driver stop" {
				ask("exit stop")("exit", "stop")
			}
			return nil
		}
		b.w.arm(atEnd)
		b.w.body(v.ID).die(vmm.ExitPowerOff, "by itself")
		if err := <-asked; fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), "it is stopped") {
			t.Errorf("after its end: %v", err)
		}
		b.expect("web", vm.Stopped)
		if err := b.Delete(t.Context(), "web", false, nil); err != nil {
			t.Fatal(err)
		}
		s := spec("web")
		s.Ephemeral = true
		v, err := b.Create(t.Context(), s, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		b.w.arm(atEnd)
		b.w.body(v.ID).die(vmm.ExitPowerOff, "by itself")
		if err := <-asked; fault.KindOf(err) != fault.NotFound || !strings.Contains(err.Error(), "VM web was deleted") {
			t.Errorf("after the end of one that goes with its machine: %v", err)
		}
		b.finish()
	})
}

// A machine that ends while it is to be saved: the channel breaks a moment before the end is known.
func TestSuspendOfAMachineThatEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		v := b.create("web")
		b.w.arm(func(_ context.Context, point string) error {
			if point != "quiesce" {
				return nil
			}
			time.AfterFunc(300*time.Millisecond, func() { b.w.body(v.ID).die(vmm.ExitKilled, "by somebody") })
			return connect.NewError(connect.CodeUnavailable, io.ErrUnexpectedEOF)
		})
		err := b.suspend(t.Context())
		if fault.KindOf(err) != fault.Conflict || strings.Contains(err.Error(), "runs on") {
			t.Errorf("%v", err)
		}
		b.expect("web", vm.Failed)
		b.finish()
	})
}

// Who waits for the owner of a VM waits no longer than it wants to.
func TestAgentIsNotWaitedForWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := newBench(t)
		v := b.create("web")
		release, err := b.locks.acquire(t.Context(), v.ID)
		if err != nil {
			t.Fatal(err)
		}
		m := b.machineOf(v.ID)
		b.setLive(v.ID, nil) // as while its end is written down
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := b.Agent(ctx, "web"); fault.KindOf(err) != fault.Timeout {
			t.Errorf("when its time was over: %v", err)
		}
		ctx, interrupt := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, interrupt)
		if _, err := b.Agent(ctx, "web"); fault.KindOf(err) != fault.Interrupted {
			t.Errorf("on Ctrl-C: %v", err)
		}
		b.setLive(v.ID, m)
		release()
		if _, err := b.Agent(t.Context(), "web"); err != nil {
			t.Error(err)
		}
		b.finish()
	})
}

func (b *bench) setLive(id vm.ID, m *machine) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.live, id)
	if m != nil {
		b.live[id] = m
	}
}
