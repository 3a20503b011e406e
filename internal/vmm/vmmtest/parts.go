package vmmtest

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/vmm"
)

// testLife is one machine from start to power-off; one boot serves many checks.
func testLife(t *testing.T, target Target) {
	f := newFixture(t, target)
	r := f.start()
	h := r.Handle()
	if h.PID <= 0 || h.StartTime == 0 {
		t.Errorf("handle %+v names no process", h)
	}
	boot := f.ping(r)
	f.checkExec(r)
	f.checkSecondStart(r)
	f.checkManyStreams(r)
	f.checkStranger(r, h)
	r = f.checkAdopt(r, h, boot)

	f.shutdown(r, agentv1.ShutdownRequest_MODE_POWEROFF)
	f.waitExit(r, ends, vmm.ExitPowerOff)
	for range 2 {
		if err := r.Stop(f.ctx()); err != nil {
			t.Errorf("stop after the end: %v", err)
		}
	}
	if _, err := r.DialGuest(f.ctx()); fault.KindOf(err) != fault.Conflict {
		t.Errorf("stream to a machine that has ended: %v", err)
	}
	if _, err := f.New(t).Adopt(f.ctx(), f.m, h); fault.KindOf(err) != fault.NotFound {
		t.Errorf("adopting a machine that has ended: %v", err)
	}
	f.nothingLeft()
}

func (f *fixture) checkExec(r vmm.Running) {
	f.t.Helper()
	if out, code := f.exec(r, "echo", "hello", "world"); out != "hello world\n" || code != 0 {
		f.t.Errorf("echo: %q, %d", out, code)
	}
	if _, code := f.exec(r, "no-such-program"); code != 127 {
		f.t.Errorf("a missing program: code %d", code)
	}
}

// checkSecondStart: the machine that runs is not harmed by another start.
func (f *fixture) checkSecondStart(r vmm.Running) {
	f.t.Helper()
	second, err := f.New(f.t).Start(f.ctx(), f.m)
	if err == nil {
		f.stopAtEnd(second)
	}
	if fault.KindOf(err) != fault.Conflict {
		f.t.Errorf("second start: %v", err)
	}
	f.ping(r)
}

func (f *fixture) checkManyStreams(r vmm.Running) {
	f.t.Helper()
	ctx := f.ctx()
	var wg sync.WaitGroup
	for range 20 {
		wg.Go(func() {
			c := guest.NewClient(r.DialGuest)
			defer c.Close()
			if _, err := c.Ping(ctx, &agentv1.PingRequest{}); err != nil {
				f.t.Errorf("one of many pings: %v", err)
			}
		})
	}
	wg.Wait()
}

// checkStranger: a handle that names another process finds nothing, and does no harm.
func (f *fixture) checkStranger(r vmm.Running, h vmm.Handle) {
	f.t.Helper()
	h.StartTime++
	if _, err := f.New(f.t).Adopt(f.ctx(), f.m, h); fault.KindOf(err) != fault.NotFound {
		f.t.Errorf("adopting another process: %v", err)
	}
	if len(f.sockets()) == 0 {
		f.t.Error("sockets of the running machine were removed")
	}
	f.ping(r)
}

// checkAdopt lets go of the machine and finds it again, by its handle and by its directory alone.
func (f *fixture) checkAdopt(r vmm.Running, h vmm.Handle, boot string) vmm.Running {
	f.t.Helper()
	for _, handle := range []vmm.Handle{h, {}} {
		if err := r.Close(); err != nil {
			f.t.Fatalf("close: %v", err)
		}
		select {
		case <-r.Done():
			f.t.Error("close says that the machine has ended")
		default:
		}
		if _, err := r.DialGuest(f.ctx()); err == nil {
			f.t.Error("a stream on a machine that was let go")
		}
		r = f.adopt(handle)
		if got := r.Handle(); got.PID != h.PID || got.StartTime != h.StartTime {
			f.t.Errorf("adopted with handle %+v, started with %+v", got, h)
		}
		if again := f.ping(r); again != boot {
			f.t.Errorf("boot id %s became %s", boot, again)
		}
	}
	return r
}

func testReboot(t *testing.T, target Target) {
	f := newFixture(t, target)
	r := f.start()
	f.ping(r)
	f.shutdown(r, agentv1.ShutdownRequest_MODE_REBOOT)
	f.waitExit(r, ends, vmm.ExitReboot)
	f.nothingLeft()
}

func testKilled(t *testing.T, target Target) {
	f := newFixture(t, target)
	// What a crash of long ago may have left in the way.
	if err := os.WriteFile(filepath.Join(f.m.Dir, vmm.GuestSocket), []byte("no socket"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := f.start()
	if err := syscall.Kill(r.Handle().PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	f.waitExit(r, ends, vmm.ExitKilled)
	f.nothingLeft()
}

// testKilledUnwatched: the machine dies while no daemon runs; what it left is removed by Adopt, and
// does not hinder the next start.
func testKilledUnwatched(t *testing.T, target Target) {
	for _, next := range []string{"adopt", "start"} {
		f := newFixture(t, target)
		r := f.start()
		h := r.Handle()
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		if err := syscall.Kill(h.PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		f.awaitGone(h.PID)
		if len(f.sockets()) == 0 {
			t.Fatal("no sockets are left to test with")
		}
		if next == "start" {
			if err := f.start().Stop(f.ctx()); err != nil {
				t.Errorf("stop: %v", err)
			}
		} else if _, err := f.New(t).Adopt(f.ctx(), f.m, h); fault.KindOf(err) != fault.NotFound {
			t.Errorf("adopting the dead: %v", err)
		}
		f.nothingLeft()
	}
}

// awaitGone waits until a process is dead; a zombie of ours is.
func (f *fixture) awaitGone(pid int) {
	f.t.Helper()
	for deadline := time.Now().Add(ends); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		var ws syscall.WaitStatus
		if got, _ := syscall.Wait4(pid, &ws, syscall.WNOHANG, nil); got == pid {
			return
		}
		if syscall.Kill(pid, 0) != nil {
			return
		}
	}
	f.t.Fatalf("process %d does not die", pid)
}

func testStopWhileBooting(t *testing.T, target Target) {
	f := newFixture(t, target, target.Hang...)
	r := f.start()
	ctx, cancel := context.WithTimeout(f.ctx(), 200*time.Millisecond)
	defer cancel()
	if _, err := r.DialGuest(ctx); fault.KindOf(err) != fault.Timeout {
		t.Errorf("stream to a guest that does not answer: %v", err)
	}
	waiting := make(chan error, 1)
	go func() {
		_, err := r.DialGuest(f.ctx())
		waiting <- err
	}()
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			if err := r.Stop(f.ctx()); err != nil {
				t.Errorf("stop: %v", err)
			}
		})
	}
	wg.Wait()
	f.waitExit(r, ends, vmm.ExitStopped)
	if err := <-waiting; fault.KindOf(err) != fault.Conflict {
		t.Errorf("the stream that was waited for: %v", err)
	}
	f.nothingLeft()
}

// testStopWithoutTime: a Stop whose context has ended still does its work.
func testStopWithoutTime(t *testing.T, target Target) {
	f := newFixture(t, target, target.Hang...)
	r := f.start()
	ctx, cancel := context.WithCancel(f.ctx())
	cancel()
	if err := r.Stop(ctx); err != nil {
		t.Errorf("stop: %v", err)
	}
	f.waitExit(r, ends, vmm.ExitStopped)
	f.nothingLeft()
}

func testPanic(t *testing.T, target Target) {
	f := newFixture(t, target, target.Panic...)
	r := f.start()
	exit := f.waitExit(r, target.BootTimeout, vmm.ExitPanic)
	if !strings.Contains(exit.Detail, target.PanicText) {
		t.Errorf("detail %q lacks %q", exit.Detail, target.PanicText)
	}
	f.nothingLeft()
}

func testStartRefused(t *testing.T, target Target) {
	f := newFixture(t, target)
	good := f.m
	target.Break(&f.m)
	r, err := f.d.Start(f.ctx(), f.m)
	if err == nil {
		f.stopAtEnd(r)
		t.Fatal("the VMM took a broken machine")
	}
	t.Logf("refused: %v (hint: %s)", err, fault.HintOf(err))
	f.nothingLeft()
	f.m = good
	if err := f.start().Stop(f.ctx()); err != nil {
		t.Errorf("stop: %v", err)
	}
}

func testStartCancelled(t *testing.T, target Target) {
	f := newFixture(t, target)
	ctx, cancel := context.WithCancel(f.ctx())
	cancel()
	r, err := f.d.Start(ctx, f.m)
	if err == nil {
		f.stopAtEnd(r)
	}
	if fault.KindOf(err) != fault.Interrupted {
		t.Errorf("start with a context that has ended: %v", err)
	}
	f.nothingLeft()
}

// testMissing: Check finds what Start would fail on, and both change nothing.
func testMissing(t *testing.T, target Target) {
	f := newFixture(t, target)
	good := f.m
	gone := filepath.Join(f.m.Dir, "no-such-file")
	for name, spoil := range map[string]func(*vmm.Machine){
		"kernel":    func(m *vmm.Machine) { m.Kernel = gone },
		"initramfs": func(m *vmm.Machine) { m.Initramfs = gone },
		"disk":      func(m *vmm.Machine) { m.Disks = []vmm.Disk{{Role: "root", Path: gone}} },
	} {
		f.m = good
		spoil(&f.m)
		if err := f.d.Check(f.ctx(), f.m); fault.KindOf(err) != fault.Precondition {
			t.Errorf("check without %s: %v", name, err)
		}
		if _, err := f.d.Start(f.ctx(), f.m); fault.KindOf(err) != fault.Precondition {
			t.Errorf("start without %s: %v", name, err)
		}
	}
	f.m = good
	f.nothingLeft()
}
