package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/hosttest"
	"banger/internal/progress"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/fake"
	"banger/internal/vmm/firecracker/fctest"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == fake.Argument {
		os.Exit(fake.Main(os.Args[2:]))
	}
	hosttest.Main(program(func() int { return fctest.Main(m) }))
}

// program is what hosttest runs.
type program func() int

func (p program) Run() int { return p() }

func TestLifeOfAVM(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	var told []string
	sink := progress.Sink(func(e progress.Event) {
		if e.Status == progress.Done {
			told = append(told, e.Stage)
		}
	})
	v, err := b.Create(ctx, spec("web"), true, sink)
	if err != nil || v.State != vm.Running || v.Creating || v.StartedAt.IsZero() || v.Accelerator != "test" || v.IP.String() != "10.0.0.2" {
		t.Fatalf("%+v, %v", v, err)
	}
	want := []string{"check", "record", "disk", "net", "keys", "boot", "agent", "ready"}
	if !slices.Equal(told, want) {
		t.Errorf("stages of create %v, want %v", told, want)
	}
	events, err := b.Events(ctx, "web", 0)
	if err != nil || len(events) != len(want) || events[0].Stage != "check" || events[7].Operation != "create" {
		t.Errorf("events %+v, %v", events, err)
	}
	agent, err := b.Agent(ctx, "web")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := agent.Ping(ctx, &agentv1.PingRequest{}); err != nil {
		t.Fatal(err)
	}
	if again, err := b.Start(ctx, "web", nil); err != nil || again.State != vm.Running {
		t.Fatalf("second start: %+v, %v", again, err)
	}
	told = nil
	if v, err = b.Stop(ctx, string(v.ID), false, sink); err != nil || v.State != vm.Stopped || !v.StartedAt.IsZero() || v.Handle != nil {
		t.Fatalf("stop: %+v, %v", v, err)
	}
	if want := []string{"record", "shutdown", "keys", "net", "disk", "done"}; !slices.Equal(told, want) {
		t.Errorf("stages of stop %v, want %v", told, want)
	}
	if b.w.String() != down(v.ID) {
		t.Fatalf("after the stop:\n%s", b.w)
	}
	if _, err := b.Agent(ctx, "web"); fault.KindOf(err) != fault.Conflict {
		t.Errorf("agent of a stopped VM: %v", err)
	}
	if _, err := b.Stop(ctx, "web", false, nil); err != nil {
		t.Errorf("second stop: %v", err)
	}
	if v, err = b.Restart(ctx, "web", nil); err != nil || v.State != vm.Running {
		t.Fatalf("restart of a stopped one: %+v, %v", v, err)
	}
	first := b.w.body(v.ID)
	if v, err = b.Restart(ctx, "web", nil); err != nil || v.State != vm.Running || b.w.body(v.ID) == first {
		t.Fatalf("restart: %+v, %v", v, err)
	}
	if err := b.Delete(ctx, "web", false, nil); fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" {
		t.Errorf("delete of a running one: %v", err)
	}
	if b.w.String() != up(v.ID) {
		t.Fatalf("a refused delete changed the host:\n%s", b.w)
	}
	if err := b.Delete(ctx, "web", true, nil); err != nil {
		t.Fatal(err)
	}
	b.nothingLeft("after the delete")
	if err := b.Delete(ctx, "web", true, nil); fault.KindOf(err) != fault.NotFound {
		t.Errorf("delete of nothing: %v", err)
	}
	if events, err = b.Events(ctx, "web", 5); err != nil || len(events) != 5 || events[4].Stage != "forget" {
		t.Errorf("what happened to the deleted one: %+v, %v", events, err)
	}
}

func TestCreateWithoutStart(t *testing.T) {
	b := newBench(t)
	v, err := b.Create(t.Context(), spec("web"), false, nil)
	if err != nil || v.State != vm.Stopped || v.Creating || b.w.String() != "" {
		t.Fatalf("%+v, %v, host %q", v, err, b.w)
	}
	if v, err = b.Start(t.Context(), "web", nil); err != nil || b.w.String() != up(v.ID) {
		t.Fatalf("%+v, %v", v, err)
	}
}

func TestBadRequestsTouchNothing(t *testing.T) {
	b := newBench(t)
	ctx := t.Context()
	bad := spec("web")
	bad.CPUs = 0
	if _, err := b.Create(ctx, bad, true, nil); fault.KindOf(err) != fault.Usage {
		t.Errorf("no CPUs: %v", err)
	}
	bad = spec("web")
	bad.VMM = "vbox"
	if _, err := b.Create(ctx, bad, true, nil); fault.KindOf(err) != fault.Usage {
		t.Errorf("unknown VMM: %v", err)
	}
	for _, err := range []error{
		func() error { _, err := b.Start(ctx, "none", nil); return err }(), func() error { _, err := b.Stop(ctx, "none", true, nil); return err }(),
		func() error { _, err := b.Restart(ctx, "none", nil); return err }(), func() error { _, err := b.Get(ctx, "none"); return err }(),
		func() error { _, err := b.Events(ctx, "none", 1); return err }(), func() error { _, err := b.Agent(ctx, "none"); return err }(),
	} {
		if fault.KindOf(err) != fault.NotFound {
			t.Errorf("unknown VM: %v", err)
		}
	}
	if points := b.w.points(); len(points) > 0 {
		t.Errorf("touched %v", points)
	}
	b.nothingLeft("after bad requests")
}

// A fault at each step of create takes all of it back.
func TestCreateFailsAtEachStep(t *testing.T) {
	b := newBench(t)
	b.w.arm(nil)
	b.create("web")
	points := b.w.points()
	if err := b.Delete(t.Context(), "web", true, nil); err != nil {
		t.Fatal(err)
	}
	for _, o := range occurrences(points) {
		if o.point == "ping" {
			continue // it is asked again: see the boot timeout
		}
		b.w.arm(failAt(o.point, o.n, errInjected))
		_, err := b.Create(t.Context(), spec("web"), true, nil)
		if !errors.Is(err, errInjected) {
			t.Errorf("%s: got %v", o.point, err)
		}
		b.w.arm(nil)
		b.nothingLeft("create failing at " + o.point)
	}
	b.create("web") // and then it works
}

// A create that is cancelled after any stage leaves nothing and says that it was interrupted.
func TestCreateCancelledAtEachStage(t *testing.T) {
	b := newBench(t)
	for _, stage := range []string{"check", "record", "disk", "net", "keys", "machine", "boot", "agent"} {
		ctx, cancel := context.WithCancel(t.Context())
		b.hook = func(_, reached string) {
			if reached == stage {
				cancel()
			}
		}
		_, err := b.Create(ctx, spec("web"), true, nil)
		cancel()
		b.hook = nil
		if fault.ExitCode(err) != 130 {
			t.Errorf("%s: got %v", stage, err)
		}
		b.nothingLeft("create cancelled after " + stage)
	}
}

func TestStartFailsAtEachStep(t *testing.T) {
	b := newBench(t)
	v := b.create("web")
	stop := func() {
		t.Helper()
		if _, err := b.Stop(t.Context(), "web", false, nil); err != nil {
			t.Fatal(err)
		}
	}
	stop()
	b.w.arm(nil)
	if _, err := b.Start(t.Context(), "web", nil); err != nil {
		t.Fatal(err)
	}
	points := b.w.points()
	stop()
	for _, o := range occurrences(points) {
		if o.point == "ping" {
			continue
		}
		b.w.arm(failAt(o.point, o.n, errInjected))
		_, err := b.Start(t.Context(), "web", nil)
		b.w.arm(nil)
		got, _ := b.Get(t.Context(), "web")
		if !errors.Is(err, errInjected) {
			t.Errorf("%s: got %v", o.point, err)
		}
		wantState := vm.Failed
		if strings.HasPrefix(o.point, "check") { // nothing was begun
			wantState = vm.Stopped
		}
		if got.State != wantState || (wantState == vm.Failed) != strings.Contains(got.Reason, "injected") {
			t.Errorf("%s: VM is %s (%q), want %s", o.point, got.State, got.Reason, wantState)
		}
		if s := b.w.String(); s != down(v.ID) {
			t.Fatalf("start failing at %s left:\n%s", o.point, s)
		}
		stop() // a failed one becomes a stopped one
	}
	if v, err := b.Start(t.Context(), "web", nil); err != nil || v.Reason != "" {
		t.Fatalf("start after failures: %+v, %v", v, err)
	}
}

func TestStartCancelledIsStopped(t *testing.T) {
	b := newBench(t)
	v, err := b.Create(t.Context(), spec("web"), false, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, stage := range []string{"record", "disk", "machine", "boot", "agent"} {
		ctx, cancel := context.WithCancel(t.Context())
		b.hook = func(_, reached string) {
			if reached == stage {
				cancel()
			}
		}
		_, err := b.Start(ctx, "web", nil)
		cancel()
		b.hook = nil
		got, _ := b.Get(t.Context(), "web")
		if fault.ExitCode(err) != 130 || got.State != vm.Stopped || strings.Contains(b.w.String(), "up ") {
			t.Errorf("%s: %v, VM %s (%s), host\n%s", stage, err, got.State, got.Reason, b.w)
		}
	}
	_ = v
}

// What a stop or delete did not get done is told, kept in the row, and done by the next one.
func TestTakeDownFailsAtEachStep(t *testing.T) {
	for _, verb := range []string{"stop", "delete"} {
		b := newBench(t)
		run := func() error {
			if verb == "delete" {
				return b.Delete(t.Context(), "web", true, nil)
			}
			_, err := b.Stop(t.Context(), "web", false, nil)
			return err
		}
		b.create("web")
		b.w.arm(nil)
		if err := run(); err != nil {
			t.Fatal(err)
		}
		points := b.w.points()
		_ = b.Delete(t.Context(), "web", true, nil)
		for _, o := range occurrences(points) {
			v := b.create("web")
			b.w.arm(failAt(o.point, o.n, errInjected))
			err := run()
			b.w.arm(nil)
			if o.point == "shutdown" { // then the power button does it
				if err != nil {
					t.Errorf("%s: %v", verb, err)
				}
			} else if !errors.Is(err, errInjected) {
				t.Errorf("%s at %s: got %v", verb, o.point, err)
			}
			if err := run(); err != nil {
				t.Errorf("%s again after %s: %v", verb, o.point, err)
			}
			if verb == "stop" {
				if s := b.w.String(); s != down(v.ID) {
					t.Fatalf("stop failing at %s left:\n%s", o.point, s)
				}
				if err := b.Delete(t.Context(), "web", false, nil); err != nil {
					t.Fatal(err)
				}
			}
			b.nothingLeft(verb + " failing at " + o.point)
		}
	}
}

// Once begun, a stop goes on without its caller.
func TestStopIsNotCancelledHalfWay(t *testing.T) {
	b := newBench(t)
	v := b.create("web")
	ctx, cancel := context.WithCancel(t.Context())
	b.hook = func(_, stage string) {
		if stage == stageRecord {
			cancel()
		}
	}
	if _, err := b.Stop(ctx, "web", false, nil); err != nil {
		t.Fatal(err)
	}
	if s := b.w.String(); s != down(v.ID) {
		t.Fatalf("left:\n%s", s)
	}
}

func TestStopInsists(t *testing.T) {
	b := newBench(t)
	v := b.create("web")
	b.w.deaf = true
	b.w.arm(nil)
	b.c.StopTimeout = 50 * time.Millisecond
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	if _, err := b.Stop(ctx, "web", true, nil); err != nil {
		t.Fatal(err)
	}
	if steps := b.w.points(); slices.Contains(steps, "shutdown") || slices.Contains(steps, "button") {
		t.Errorf("force asked first: %v", steps)
	}
	if s := b.w.String(); s != down(v.ID) {
		t.Fatalf("left:\n%s", s)
	}
}

func TestGuestThatNeverAnswers(t *testing.T) {
	b := newBench(t)
	b.w.mute = true
	b.c.BootTimeout = 50 * time.Millisecond
	_, err := b.Create(t.Context(), spec("web"), true, nil)
	if fault.KindOf(err) != fault.Timeout || !strings.Contains(err.Error()+fault.HintOf(err), vmm.SerialLog) {
		t.Errorf("got %v, hint %q", err, fault.HintOf(err))
	}
	b.nothingLeft("after the boot timeout")
}

// TestFailedCreateTellsTheConsole: its file goes with the VM, so the hint must not send anybody there.
func TestFailedCreateTellsTheConsole(t *testing.T) {
	b := newBench(t)
	b.w.mute = true
	b.c.BootTimeout = 50 * time.Millisecond
	b.hook = func(_, stage string) {
		if stage == stageBoot {
			for dir := range b.w.machines {
				text := strings.Repeat("long ago\n", 1000) + "\x1b[2Jfirst\r\nno \xffroot\r\n"
				if err := os.WriteFile(filepath.Join(dir, vmm.SerialLog), []byte(text), 0o600); err != nil {
					t.Error(err)
				}
			}
		}
	}
	_, err := b.Create(t.Context(), spec("web"), true, nil)
	hint := fault.HintOf(err)
	if !strings.HasSuffix(hint, "\n[2Jfirst\nno root") || strings.Contains(hint, b.p.VMs()) || strings.Count(hint, "\n") > consoleLines {
		t.Errorf("hint %q", hint)
	}
	b.hook = nil
	b.w.mute = false
	v := b.create("web")
	if _, err := b.Stop(t.Context(), "web", true, nil); err != nil {
		t.Fatal(err)
	}
	b.w.mute = true
	_, err = b.Start(t.Context(), "web", nil)
	if hint := fault.HintOf(err); hint != "its console is in "+filepath.Join(b.p.VM(v.ID), vmm.SerialLog) {
		t.Errorf("of one that stays: hint %q", hint)
	}
}

func TestGuestThatPanicsWhileBooting(t *testing.T) {
	b := newBench(t)
	b.w.mute = true
	b.hook = func(_, stage string) {
		if stage == stageBoot {
			for _, body := range b.w.machines {
				body.die(vmm.ExitPanic, "Kernel panic - not syncing: Attempted to kill init!")
			}
		}
	}
	_, err := b.Create(t.Context(), spec("web"), true, nil)
	if err == nil || !strings.Contains(err.Error(), "Attempted to kill init") || !strings.Contains(fault.HintOf(err), vmm.SerialLog) {
		t.Errorf("got %v, hint %q", err, fault.HintOf(err))
	}
	b.nothingLeft("after the panic")
}

func TestMachineEndsByItself(t *testing.T) {
	for kind, want := range map[vmm.ExitKind]vm.State{
		vmm.ExitPowerOff: vm.Stopped, vmm.ExitPanic: vm.Failed, vmm.ExitKilled: vm.Failed, vmm.ExitCrash: vm.Failed,
	} {
		b := newBench(t)
		v := b.create("web")
		b.w.body(v.ID).die(kind, "because")
		got := b.expect("web", want)
		if (want == vm.Failed) != strings.Contains(got.Reason, "because") {
			t.Errorf("%s: reason %q", kind, got.Reason)
		}
		if _, err := b.Start(t.Context(), "web", nil); err != nil { // waits for the take-down
			t.Errorf("%s: start afterwards: %v", kind, err)
		}
		if s := b.w.String(); s != up(v.ID) {
			t.Errorf("%s: host\n%s", kind, s)
		}
	}
}

func TestEphemeralGoesWithItsMachine(t *testing.T) {
	b := newBench(t)
	s := spec("web")
	s.Ephemeral = true
	end := map[string]func(vm.VM){
		"power-off": func(v vm.VM) { b.w.body(v.ID).die(vmm.ExitPowerOff, "") },
		"crash":     func(v vm.VM) { b.w.body(v.ID).die(vmm.ExitCrash, "") },
		"stop":      func(v vm.VM) { _, _ = b.Stop(t.Context(), "web", false, nil) },
	}
	for name, f := range end {
		v, err := b.Create(t.Context(), s, true, nil)
		if err != nil {
			t.Fatal(err)
		}
		f(v)
		b.expect("web", vm.Gone)
		b.nothingLeft(name)
	}
	v, err := b.Create(t.Context(), s, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	if v, err = b.Restart(t.Context(), "web", nil); err != nil || b.w.String() != up(v.ID) {
		t.Errorf("a restart is no end: %+v, %v", v, err)
	}
}

func TestRebootStartsAgainButNotForEver(t *testing.T) {
	b := newBench(t)
	v := b.create("web")
	for range maxReboots {
		body := b.w.body(v.ID)
		body.die(vmm.ExitReboot, "")
		deadline := time.Now().Add(patience)
		for next := b.w.body(v.ID); next == nil || next == body; next = b.w.body(v.ID) {
			if time.Now().After(deadline) {
				t.Fatal("not started again")
			}
			time.Sleep(time.Millisecond)
		}
		b.expect("web", vm.Running)
	}
	b.w.body(v.ID).die(vmm.ExitReboot, "")
	if got := b.expect("web", vm.Failed); !strings.Contains(got.Reason, "rebooted more than") {
		t.Errorf("reason %q", got.Reason)
	}
}

func TestTwoCreatesOfOneName(t *testing.T) {
	b := newBench(t)
	var wg sync.WaitGroup
	errs := make([]error, 4)
	for i := range errs {
		wg.Go(func() { _, errs[i] = b.Create(context.Background(), spec("web"), true, nil) })
	}
	wg.Wait()
	wins := 0
	for _, err := range errs {
		if err == nil {
			wins++
		} else if fault.KindOf(err) != fault.Conflict {
			t.Errorf("got %v", err)
		}
	}
	v, err := b.Get(t.Context(), "web")
	if wins != 1 || err != nil || b.w.String() != up(v.ID) {
		t.Fatalf("%d wins, %v, host\n%s", wins, err, b.w)
	}
}

// A create that hangs in its boot does not hold up another one, nor a list.
func TestVMsDoNotWaitForEachOther(t *testing.T) {
	b := newBench(t)
	release := make(chan struct{})
	b.w.arm(func(ctx context.Context, point string) error {
		if point == "up net" {
			select {
			case <-release:
			case <-ctx.Done():
			}
		}
		return nil
	})
	first := make(chan error)
	go func() {
		_, err := b.Create(context.Background(), spec("slow"), true, nil)
		first <- err
	}()
	b.expect("slow", vm.Starting)
	b.w.mu.Lock()
	b.w.at = nil
	b.w.mu.Unlock()
	b.create("quick")
	if all, err := b.List(t.Context()); err != nil || len(all) != 2 {
		t.Errorf("list: %v, %v", all, err)
	}
	close(release)
	if err := <-first; err != nil {
		t.Error(err)
	}
}

func TestTwentyAtOnce(t *testing.T) {
	b := newBench(t)
	var wg sync.WaitGroup
	for i := range 20 {
		wg.Go(func() {
			name := fmt.Sprintf("vm-%d", i)
			if _, err := b.Create(context.Background(), spec(name), true, nil); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if _, err := b.Stop(context.Background(), name, false, nil); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if _, err := b.Start(context.Background(), name, nil); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if err := b.Delete(context.Background(), name, true, nil); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
	wg.Wait()
	b.nothingLeft("after twenty lives")
}

// Verbs that race on one VM end in a state that is true of the host.
func TestRacingVerbs(t *testing.T) {
	b := newBench(t)
	v := b.create("web")
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			var err error
			switch i % 4 {
			case 0:
				_, err = b.Start(context.Background(), "web", nil)
			case 1:
				_, err = b.Stop(context.Background(), "web", i%8 == 1, nil)
			case 2:
				_, err = b.Restart(context.Background(), "web", nil)
			case 3:
				if body := b.w.body(v.ID); body != nil {
					body.die(vmm.ExitCrash, "raced")
				}
			}
			if k := fault.KindOf(err); err != nil && k != fault.Conflict && !strings.Contains(err.Error(), "ended while it started") &&
				!strings.Contains(err.Error(), "in the guest") {
				t.Errorf("verb %d: %v", i%4, err)
			}
		})
	}
	wg.Wait()
	if _, err := b.Stop(t.Context(), "web", true, nil); err != nil {
		t.Fatal(err)
	}
	if s := b.w.String(); s != down(v.ID) {
		t.Fatalf("left:\n%s", s)
	}
}

func TestStopAndDeleteWhileStarting(t *testing.T) {
	for _, c := range []struct {
		verb   string
		create bool
		want   vm.State
	}{{"stop", false, vm.Stopped}, {"stop", true, vm.Stopped}, {"delete", false, vm.Gone}, {"delete", true, vm.Gone}} {
		b := newBench(t)
		b.w.mute = true // the boot hangs
		started := make(chan error, 1)
		if c.create {
			go func() { _, err := b.Create(context.Background(), spec("web"), true, nil); started <- err }()
		} else {
			if _, err := b.Create(t.Context(), spec("web"), false, nil); err != nil {
				t.Fatal(err)
			}
			go func() { _, err := b.Start(context.Background(), "web", nil); started <- err }()
		}
		v := b.expect("web", vm.Starting)
		for b.w.body(v.ID) == nil {
			time.Sleep(time.Millisecond)
		}
		if err := b.Delete(t.Context(), "web", false, nil); fault.KindOf(err) != fault.Conflict {
			t.Errorf("%+v: delete without force: %v", c, err)
		}
		begin := time.Now()
		var err error
		if c.verb == "stop" {
			_, err = b.Stop(t.Context(), "web", false, nil)
		} else {
			err = b.Delete(t.Context(), "web", true, nil)
		}
		if err != nil || time.Since(begin) > patience {
			t.Errorf("%+v: %v after %s", c, err, time.Since(begin))
		}
		if err := <-started; fault.KindOf(err) != fault.Conflict {
			t.Errorf("%+v: the start ended with %v", c, err)
		}
		b.expect("web", c.want)
		if c.want == vm.Gone {
			b.nothingLeft("delete while starting")
		} else if s := b.w.String(); s != down(v.ID) {
			t.Errorf("%+v left:\n%s", c, s)
		}
	}
}

func TestCloseLetsVMsRunOn(t *testing.T) {
	b := newBench(t)
	v := b.create("web")
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Start(t.Context(), "web", nil); fault.KindOf(err) != fault.Interrupted {
		t.Errorf("verb after close: %v", err)
	}
	b.reborn()
	if told, err := b.Reconcile(t.Context()); err != nil || len(told) > 0 {
		t.Fatalf("reconcile after a clean end mended %v, %v", told, err)
	}
	if s := b.w.String(); s != up(v.ID) {
		t.Fatalf("host:\n%s", s)
	}
	if _, err := b.Agent(t.Context(), "web"); err != nil {
		t.Error(err)
	}
	b.w.body(v.ID).die(vmm.ExitKilled, "later") // and it is watched
	b.expect("web", vm.Failed)
}

func TestCloseTakesBackAStart(t *testing.T) {
	b := newBench(t)
	b.w.mute = true
	started := make(chan error, 1)
	go func() { _, err := b.Create(context.Background(), spec("web"), true, nil); started <- err }()
	b.expect("web", vm.Starting)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-started; fault.KindOf(err) != fault.Interrupted {
		t.Errorf("got %v", err)
	}
	b.nothingLeft("after close")
}

// The daemon dies after each stage of each verb; the next one leaves no machine, no part and no
// file that nobody owns, and VMs that ran still run and answer.
func TestDeathAtEachStage(t *testing.T) {
	suspend := func(b *bench) error { _, err := b.Suspend(context.Background(), "web", nil); return err }
	stop := func(b *bench) error { _, err := b.Stop(context.Background(), "web", false, nil); return err }
	for name, d := range map[string]death{
		"create":         {operation: "create", run: func(b *bench) error { _, err := b.Create(context.Background(), spec("web"), true, nil); return err }},
		"start":          {operation: "start", prepare: stop, run: func(b *bench) error { _, err := b.Start(context.Background(), "web", nil); return err }},
		"stop":           {operation: "stop", run: stop},
		"stop ephemeral": {operation: "stop", ephemeral: true, run: stop},
		"restart":        {operation: "restart", run: func(b *bench) error { _, err := b.Restart(context.Background(), "web", nil); return err }},
		"suspend":        {operation: "suspend", run: suspend},
		"resume":         {operation: "resume", prepare: suspend, run: func(b *bench) error { _, err := b.Resume(context.Background(), "web", nil); return err }},
		"cold start":     {operation: "start", prepare: suspend, run: func(b *bench) error { _, err := b.Boot(context.Background(), "web", nil); return err }},
		"drop memory":    {operation: "stop", prepare: suspend, run: stop},
		"delete":         {operation: "delete", run: func(b *bench) error { return b.Delete(context.Background(), "web", true, nil) }},
	} {
		n := 1
		for d.dieAfter(t, n) {
			n++
		}
		if n < 5 {
			t.Errorf("%s has only %d stages", name, n-1)
		}
	}
}

// death is a verb during which the daemon dies.
type death struct {
	operation string
	ephemeral bool
	prepare   func(*bench) error
	run       func(*bench) error
}

func (d death) before(b *bench) {
	b.t.Helper()
	if d.operation == "create" {
		return
	}
	s := spec("web")
	s.Ephemeral = d.ephemeral
	if _, err := b.Create(b.t.Context(), s, true, nil); err != nil {
		b.t.Fatal(err)
	}
	if d.prepare != nil {
		if err := d.prepare(b); err != nil {
			b.t.Fatal(err)
		}
	}
}

// dieAfter lets the daemon die after the nth stage, and tells whether the verb has that many.
func (d death) dieAfter(t *testing.T, n int) bool {
	t.Helper()
	b := newBench(t)
	other := b.create("other")
	d.before(b)
	reached, release := make(chan string), make(chan struct{})
	count := 0
	b.hook = func(operation, stage string) {
		if operation != d.operation {
			return
		}
		if count++; count == n {
			reached <- stage
			<-release // a dead process does nothing more
		}
	}
	ended := make(chan error, 1)
	go func() { ended <- d.run(b) }()
	var stage string
	select {
	case stage = <-reached:
	case err := <-ended:
		if err != nil {
			t.Fatalf("%s: %v", d.operation, err)
		}
		return false
	}
	dead := b.Engine
	dead.die()
	b.hook = nil
	b.reborn()
	told, err := b.Reconcile(t.Context())
	if err != nil {
		t.Errorf("%s, dead after %s: reconcile: %v", d.operation, stage, err)
	}
	if v, err := b.Get(t.Context(), "web"); err == nil && d.ephemeral && v.State != vm.Running { // its stop goes on in the background
		b.expect("web", vm.Gone)
	}
	b.settled(t, other, fmt.Sprintf("%s, dead after %s, mended %q", d.operation, stage, told))
	// What the dead goroutine still does must not reach this world.
	b.w.arm(func(context.Context, string) error { return errInjected })
	_ = dead.c.Store.Close()
	close(release)
	<-ended
	b.w.arm(nil)
	return true
}

// settled checks that rows and host agree and that the other VM was not harmed.
func (b *bench) settled(t *testing.T, other vm.VM, when string) {
	t.Helper()
	want := []string{up(other.ID)}
	v, err := b.Get(t.Context(), "web")
	for deadline := time.Now().Add(patience); err == nil && (v.State == vm.Stopping || v.State == vm.Deleting) && time.Now().Before(deadline); {
		time.Sleep(5 * time.Millisecond)
		v, err = b.Get(t.Context(), "web")
	}
	if err == nil {
		switch v.State {
		case vm.Running:
			want = append(want, up(v.ID))
		case vm.Stopped, vm.Failed, vm.Suspended:
			for _, line := range strings.Split(down(v.ID), "\n") {
				if strings.Contains(b.w.String(), line) { // what it never made it does not keep
					want = append(want, line)
				}
			}
		default:
			t.Errorf("%s: VM is %s", when, v.State)
		}
	}
	lines := strings.Split(strings.Join(want, "\n"), "\n")
	slices.Sort(lines)
	if got := b.w.String(); got != strings.Join(lines, "\n") {
		t.Errorf("%s (VM %q): host is\n%s\nwant\n%s", when, v.State, got, strings.Join(lines, "\n"))
	}
	b.memoryFits(v, when)
	entries, _ := os.ReadDir(b.p.VMs())
	rows, _ := b.List(t.Context())
	if len(entries) > len(rows) {
		t.Errorf("%s: %d directories for %d rows", when, len(entries), len(rows))
	}
	agent, err := b.Agent(t.Context(), "other")
	if err != nil {
		t.Fatalf("%s: %v", when, err)
	}
	if _, err := agent.Ping(t.Context(), &agentv1.PingRequest{}); err != nil {
		t.Errorf("%s: the other VM does not answer: %v", when, err)
	}
}

func TestReconcileOfAMachineThatIsGone(t *testing.T) {
	b := newBench(t)
	v := b.create("web")
	b.Engine.die()
	b.w.body(v.ID).die(vmm.ExitKilled, "")
	b.reborn()
	told, err := b.Reconcile(t.Context())
	got, _ := b.Get(t.Context(), "web")
	if err != nil || len(told) != 1 || got.State != vm.Failed || got.Reason == "" || b.w.String() != down(v.ID) {
		t.Errorf("%q, %v, VM %s (%s), host\n%s", told, err, got.State, got.Reason, b.w)
	}
}

func TestReconcileOfAGuestThatEndedItself(t *testing.T) {
	for kind, want := range map[vmm.ExitKind]vm.State{
		vmm.ExitPowerOff: vm.Stopped, vmm.ExitReboot: vm.Stopped, vmm.ExitPanic: vm.Failed, vmm.ExitCrash: vm.Failed, vmm.ExitKilled: vm.Failed,
	} {
		b := newBench(t)
		v := b.create("web")
		b.Engine.die()
		b.w.body(v.ID).die(kind, "last words")
		b.reborn()
		told, err := b.Reconcile(t.Context())
		got, _ := b.Get(t.Context(), "web")
		if err != nil || len(told) != 1 || got.State != want || (got.Reason == "") != (want == vm.Stopped) || b.w.String() != down(v.ID) {
			t.Errorf("%s: %q, %v, VM %s (%s), host\n%s", kind, told, err, got.State, got.Reason, b.w)
		}
		if kind == vmm.ExitPanic && !strings.Contains(got.Reason, "last words") {
			t.Errorf("%s: reason %q", kind, got.Reason)
		}
	}
}

func TestReconcileAfterAHostRestart(t *testing.T) {
	b := newBench(t)
	if _, err := b.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	v := b.create("web")
	b.Engine.die()
	b.w.body(v.ID).die(vmm.ExitKilled, "")
	b.boot = "second"
	b.reborn()
	told, err := b.Reconcile(t.Context())
	got, _ := b.Get(t.Context(), "web")
	if err != nil || len(told) != 1 || got.State != vm.Stopped || got.Reason != "" || b.w.String() != down(v.ID) {
		t.Errorf("%q, %v, VM %s (%s), host\n%s", told, err, got.State, got.Reason, b.w)
	}
}

// TestHostRestartIsKnownUntilReconciled: a daemon that could not reconcile does not make the next one
// take the VMs for failed.
func TestHostRestartIsKnownUntilReconciled(t *testing.T) {
	b := newBench(t)
	if _, err := b.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	v := b.create("web")
	b.Engine.die()
	b.w.body(v.ID).die(vmm.ExitKilled, "")
	b.boot = "second"
	b.reborn()
	b.c.Drivers = nil // it cannot look after the VM
	if _, err := b.Reconcile(t.Context()); err == nil {
		t.Fatal("nothing was in the way of the first reconcile")
	}
	b.Engine.die()
	b.reborn()
	if _, err := b.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.expect("web", vm.Stopped)
}

// TestVerbsOnAVMNobodyHolds: the end of its machine could not be written, or it could not be taken up.
func TestVerbsOnAVMNobodyHolds(t *testing.T) {
	for what, lives := range map[string]bool{"its machine lives": true, "its machine is gone": false} {
		t.Run(what, func(t *testing.T) {
			b := newBench(t)
			v := b.create("web")
			if err := b.takeMachine(v.ID).letGo(); err != nil {
				t.Fatal(err)
			}
			if !lives {
				b.w.body(v.ID).die(vmm.ExitKilled, "")
			}
			if _, err := b.Start(t.Context(), "web", nil); err != nil {
				t.Fatal(err)
			}
			b.expect("web", vm.Running)
			agent, err := b.Agent(t.Context(), "web")
			if err != nil {
				t.Fatal(err)
			}
			if _, err := agent.Ping(t.Context(), &agentv1.PingRequest{}); err != nil {
				t.Error(err)
			}
			if got := b.w.String(); got != up(v.ID) {
				t.Errorf("host is\n%s", got)
			}
		})
	}
}

func TestReconcileOfDirectories(t *testing.T) {
	b := newBench(t)
	for _, dir := range []string{"0000000a", "0000000b", "not-ours"} {
		if err := os.Mkdir(b.p.VMs()+"/"+dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(b.p.VMs()+"/0000000b/work.ext4", []byte("work"), 0o600); err != nil {
		t.Fatal(err)
	}
	told, err := b.Reconcile(t.Context())
	if err != nil || len(told) != 2 {
		t.Errorf("%q, %v", told, err)
	}
	if _, err := os.Stat(b.p.VMs() + "/0000000a"); err == nil {
		t.Error("the empty directory is still there")
	}
	if data, err := os.ReadFile(b.p.VMs() + "/0000000b/work.ext4"); err != nil || string(data) != "work" {
		t.Errorf("somebody's work is gone: %v", err)
	}
}
