package firecracker_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"banger/internal/fault"
	"banger/internal/hosttest"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/firecracker/fakefc"
	"banger/internal/vmm/firecracker/fctest"
)

// bench is a Firecracker that tests run on, and how it is made to run a guest that ends in some way.
type bench struct {
	path string
	real bool
}

// onBoth runs a test on the fake, and on the real Firecracker where there is one: with guests that are a few
// instructions, which run also where KVM is too slow for a kernel.
func onBoth(t *testing.T, test func(*testing.T, bench)) {
	t.Run("fake", func(t *testing.T) { test(t, bench{path: fctest.Fake(t)}) })
	t.Run("real", func(t *testing.T) { test(t, bench{path: fctest.Real(t), real: true}) })
}

func (b bench) driver(t *testing.T) vmm.Driver { return onFake(b.path)(t) }

// machine is one in a directory whose name is longer than a socket's address.
func (b bench) machine(t *testing.T, e fctest.Ending) vmm.Machine {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 30))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	m := fakeMachine(t, dir)
	if err := os.WriteFile(m.Kernel, fctest.Guest(e), 0o600); err != nil {
		t.Fatal(err)
	}
	if arg := map[fctest.Ending]string{fctest.Panic: fakefc.ArgPanic, fctest.TripleFault: fakefc.ArgTripleFault}[e]; arg != "" {
		m.Cmdline = []string{arg}
	}
	return m
}

// console waits until the machine's console has a text, and returns all of it.
func console(t *testing.T, m vmm.Machine, text string) string {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(filepath.Join(m.Dir, vmm.SerialLog))
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(b), text) {
			return string(b)
		}
		if time.Now().After(end) {
			t.Fatalf("the console lacks %q:\n%.2000s", text, b)
		}
	}
}

// said is a line that a guest of e has said once it runs.
func (b bench) said() string {
	if b.real {
		return fctest.Tick + "00000003"
	}
	return "login:"
}

func TestEndings(t *testing.T) {
	onBoth(t, func(t *testing.T, b bench) {
		for name, c := range map[string]struct {
			ending fctest.Ending
			kinds  []vmm.ExitKind
			fake   bool // the fake has it too
		}{
			"panic":        {fctest.Panic, []vmm.ExitKind{vmm.ExitPanic}, true},
			"triple fault": {fctest.TripleFault, []vmm.ExitKind{vmm.ExitCrash}, true},
			"reset":        {fctest.Reset, []vmm.ExitKind{vmm.ExitReboot}, false},
			"halt":         {fctest.Halt, []vmm.ExitKind{vmm.ExitPowerOff}, false},
		} {
			t.Run(name, func(t *testing.T) {
				if !b.real && !c.fake {
					t.Skip("the suite has it")
				}
				m := b.machine(t, c.ending)
				r := boot(t, b.driver(t), m)
				select {
				case <-r.Done():
				case <-time.After(20 * time.Second):
					t.Fatal("it does not end")
				}
				if !slices.Contains(c.kinds, r.Exit().Kind) {
					t.Errorf("%+v", r.Exit())
				}
				t.Logf("%+v", r.Exit())
				nothingLeft(t, b.driver(t), m)
			})
		}
	})
}

// TestButton: the power button ends a guest that heeds it.
func TestButton(t *testing.T) {
	onBoth(t, func(t *testing.T, b bench) {
		m := b.machine(t, fctest.Count)
		r := boot(t, b.driver(t), m)
		console(t, m, b.said())
		if err := r.PowerButton(t.Context()); err != nil {
			t.Fatal(err)
		}
		ended(t, r, vmm.ExitPowerOff, "")
	})
}

// TestBareLife: boot, adopt, pause, resume, save, and restore in other directories, with drives of their own.
func TestBareLife(t *testing.T) {
	onBoth(t, func(t *testing.T, b bench) {
		ctx, d := context.Background(), b.driver(t)
		m := b.machine(t, fctest.Count)
		m.Disks = []vmm.Disk{{Role: "root", Path: disk(t, "root"), ReadOnly: true}, {Role: "work", Path: disk(t, "work")}}
		r, err := d.Start(within(t, 20*time.Second), m)
		if err != nil {
			t.Fatal(err)
		}
		console(t, m, b.said())
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
		r, err = b.driver(t).Adopt(ctx, m, r.Handle())
		if err != nil {
			t.Fatal(err)
		}
		stopAtEnd(t, r)
		if err := r.(vmm.Saver).Save(ctx, t.TempDir()); fault.KindOf(err) != fault.Conflict {
			t.Errorf("saving one that runs: %v", err)
		}
		for range 2 {
			if err := r.(vmm.Pauser).Pause(ctx); err != nil {
				t.Fatal(err)
			}
		}
		b.standsStill(t, m)
		if err := r.(vmm.Pauser).Resume(ctx); err != nil {
			t.Fatal(err)
		}
		if b.real {
			console(t, m, next(t, m))
		}
		if err := r.(vmm.Pauser).Pause(ctx); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := r.(vmm.Saver).Save(ctx, dir); err != nil {
			t.Fatal(err)
		}
		last := next(t, m)
		if err := r.Stop(ctx); err != nil {
			t.Fatal(err)
		}
		nothingLeft(t, d, m)
		for i := range 2 {
			clone := b.machine(t, fctest.Halt) // whose kernel is not looked at
			clone.ID = vm.ID(fmt.Sprintf("1a2b3c%02d", i))
			clone.Disks = []vmm.Disk{m.Disks[0], {Role: "work", Path: disk(t, "work")}}
			r, err := d.(vmm.Restorer).Restore(within(t, 20*time.Second), clone, dir)
			if err != nil {
				t.Fatalf("restore: %v", err)
			}
			stopAtEnd(t, r)
			b.holds(t, r, clone.Disks[1].Path)
			if !b.real {
				continue
			}
			if text := console(t, clone, last); strings.Contains(text, fctest.Banner) {
				t.Errorf("it began anew:\n%s", text)
			}
		}
	})
}

// next is the line after the last one of a counting guest.
func next(t *testing.T, m vmm.Machine) string {
	t.Helper()
	text := console(t, m, "")
	at := strings.LastIndex(text, fctest.Tick)
	var n uint32
	if at < 0 {
		return ""
	}
	if _, err := fmt.Sscanf(text[at:]+"0", fctest.Tick+"%8x", &n); err != nil {
		t.Fatalf("%q: %v", text[at:], err)
	}
	return fmt.Sprintf("%s%08x", fctest.Tick, n+2) // it may have been stopped within the line
}

// standsStill: nothing is said while the guest is paused.
func (b bench) standsStill(t *testing.T, m vmm.Machine) {
	t.Helper()
	before := console(t, m, "")
	time.Sleep(150 * time.Millisecond) // some ticks
	if after := console(t, m, ""); after != before {
		t.Errorf("it goes on: %q", strings.TrimPrefix(after, before))
	}
}

// holds checks that the VMM has a drive open.
func (b bench) holds(t *testing.T, r vmm.Running, path string) {
	t.Helper()
	fds, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", r.Handle().PID))
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range fds {
		if to, err := os.Readlink(fd); err == nil && to == path {
			return
		}
	}
	t.Errorf("process %d does not have %s", r.Handle().PID, path)
}

// TestRestoreNetwork: a restored machine has a TAP device of its own, while another one holds the saved machine's; one
// that is held is refused, and nothing is left.
func TestRestoreNetwork(t *testing.T) {
	onBoth(t, func(t *testing.T, b bench) {
		if v := fctest.Version(t, b.path); strings.HasPrefix(v, "1.10.") || strings.HasPrefix(v, "1.11.") {
			t.Skipf("Firecracker %s cannot", v)
		}
		hosttest.NetNS(t)
		hosttest.TAP(t, "tap-x")
		hosttest.TAP(t, "tap-y")
		ctx, d := context.Background(), b.driver(t)
		m := b.machine(t, fctest.Count)
		m.NICs = []vmm.NIC{{TAP: "tap-x", MAC: "52:54:00:00:00:01"}}
		r := boot(t, d, m)
		console(t, m, b.said())
		if err := r.(vmm.Pauser).Pause(ctx); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := r.(vmm.Saver).Save(ctx, dir); err != nil {
			t.Fatal(err)
		}
		if err := r.(vmm.Pauser).Resume(ctx); err != nil { // and goes on to hold its device
			t.Fatal(err)
		}
		clone := b.machine(t, fctest.Count)
		clone.NICs = m.NICs
		restored, err := d.(vmm.Restorer).Restore(within(t, 20*time.Second), clone, dir)
		if err == nil {
			stopAtEnd(t, restored)
		}
		if fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "network device") {
			t.Errorf("on a device that is held: %v (hint: %s)", err, fault.HintOf(err))
		}
		nothingLeft(t, d, clone)
		clone.NICs = []vmm.NIC{{TAP: "tap-y", MAC: "52:54:00:00:00:02"}}
		if restored, err = d.(vmm.Restorer).Restore(within(t, 20*time.Second), clone, dir); err != nil {
			t.Fatalf("on another one: %v", err)
		}
		stopAtEnd(t, restored)
	})
}
