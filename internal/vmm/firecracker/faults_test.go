package firecracker_test

import (
	"bytes"
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/hosttest"
	"banger/internal/vmm"
	"banger/internal/vmm/firecracker"
	"banger/internal/vmm/firecracker/fakefc"
	"banger/internal/vmm/firecracker/fctest"
	"banger/internal/vmm/kvm"
)

// ctx ends soon enough for a test.
func within(t *testing.T, d time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// boot starts a machine, which is stopped at the end.
func boot(t *testing.T, d vmm.Driver, m vmm.Machine) vmm.Running {
	t.Helper()
	r, err := d.Start(within(t, 20*time.Second), m)
	if err != nil {
		t.Fatalf("start: %v (hint: %s)", err, fault.HintOf(err))
	}
	stopAtEnd(t, r)
	return r
}

func stopAtEnd(t *testing.T, r vmm.Running) {
	t.Cleanup(func() {
		if err := r.Stop(context.Background()); err != nil {
			t.Errorf("stop at the end: %v", err)
		}
		if err := r.Close(); err != nil {
			t.Errorf("close at the end: %v", err)
		}
	})
}

func ping(ctx context.Context, r vmm.Running) error {
	c := guest.NewClient(r.DialGuest)
	defer c.Close()
	_, err := c.Ping(ctx, &agentv1.PingRequest{})
	return err
}

// refused starts a machine that cannot be: the error is of that kind, with that word in it or its hint, and nothing is
// left behind.
func refused(t *testing.T, d vmm.Driver, m vmm.Machine, most time.Duration, kind fault.Kind, word string) {
	t.Helper()
	begin := time.Now()
	r, err := d.Start(within(t, most), m)
	if err == nil {
		stopAtEnd(t, r)
		t.Fatal("it starts")
	}
	text := err.Error() + " | " + fault.HintOf(err)
	t.Logf("after %s: %.300s", time.Since(begin).Round(time.Millisecond), text)
	if fault.KindOf(err) != kind || !strings.Contains(strings.ToLower(text), strings.ToLower(word)) {
		t.Errorf("kind %v, want %v with %q: %.1000s", fault.KindOf(err), kind, word, text)
	}
	if len(text) > 2000 {
		t.Errorf("the error has %d bytes", len(text))
	}
	nothingLeft(t, d, m)
}

func nothingLeft(t *testing.T, d vmm.Driver, m vmm.Machine) {
	t.Helper()
	entries, err := os.ReadDir(m.Dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Type()&os.ModeSocket != 0 {
			t.Errorf("%s is left", e.Name())
		}
	}
	if r, err := d.Adopt(within(t, 5*time.Second), m, vmm.Handle{}); err == nil {
		stopAtEnd(t, r)
		t.Errorf("process %d is left", r.Handle().PID)
	}
}

// TestNotFirecracker: what is given as Firecracker is none, or none for here.
func TestNotFirecracker(t *testing.T) {
	dir := t.TempDir()
	program := func(name, text string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
			t.Fatal(err)
		}
		return path
	}
	foreign := fctest.Kernel()
	foreign[0x12] = 183 // arm64
	forbidden := program("forbidden", "#!/bin/sh\n")
	if err := os.Chmod(forbidden, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ path, word string }{
		"gone":         {filepath.Join(dir, "gone"), "firecracker"},
		"a directory":  {dir, "firecracker"},
		"no program":   {forbidden, "permission"},
		"another":      {program("another", "#!/bin/sh\necho something else\n"), "is no Firecracker"},
		"silent":       {program("silent", "#!/bin/sh\n"), "is no Firecracker"},
		"noisy":        {program("noisy", "#!/bin/sh\nhead -c 1000000 /dev/zero\n"), "is no Firecracker"},
		"failing":      {program("failing", "#!/bin/sh\necho no >&2\nexit 3\n"), "--version"},
		"architecture": {program("arm64", string(foreign)), "no program for this host"},
		"too old":      {fctest.Faulty(t, fakefc.Faults{Version: "1.9.1"}), "too old"},
		"too new":      {fctest.Faulty(t, fakefc.Faults{Version: "2.0.0"}), "not known"},
		"no version":   {program("no-version", "#!/bin/sh\necho Firecracker vX\n"), "no version"},
	} {
		t.Run(name, func(t *testing.T) {
			d := onFake(c.path)(t)
			_, err := d.Caps(within(t, 20*time.Second))
			text := err.Error() + " | " + fault.HintOf(err)
			t.Logf("%.300s", text)
			if fault.KindOf(err) != fault.Precondition || !strings.Contains(strings.ToLower(text), strings.ToLower(c.word)) || len(text) > 2000 {
				t.Errorf("%v: %.1000s", fault.KindOf(err), text)
			}
			if fault.HintOf(err) == "" {
				t.Errorf("no hint: %v", err)
			}
			refused(t, d, fakeMachine(t, t.TempDir()), 20*time.Second, fault.Precondition, c.word)
		})
	}
	t.Setenv("PATH", dir)
	if _, err := onFake("")(t).Caps(t.Context()); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "not installed") {
		t.Errorf("without one: %v", err)
	}
	slow := firecracker.New(firecracker.Options{
		Binary: fctest.Fake(t), KVM: func() kvm.Result { return kvm.Result{Reason: "this KVM is too slow"} },
	})
	if _, err := slow.Caps(t.Context()); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "too slow") || fault.HintOf(err) == "" {
		t.Errorf("on a slow KVM: %v", err)
	}
}

// TestEveryVersion: machines of all versions that are known boot, pause, are saved, and are restored, where that works.
func TestEveryVersion(t *testing.T) {
	for _, version := range []string{"1.10.0", "1.11.0", "1.12.1", "1.13.1", "1.14.0", "1.15.1", "1.16.0", "1.16.1", "1.17.0-dev"} {
		t.Run(version, func(t *testing.T) {
			var log bytes.Buffer
			d := firecracker.New(firecracker.Options{
				Binary: fctest.Faulty(t, fakefc.Faults{Version: version}), KVM: func() kvm.Result { return kvm.Result{Usable: true} },
				Log: slog.New(slog.NewTextHandler(&log, nil)),
			})
			caps, err := d.Caps(t.Context())
			if err != nil || caps.Version != version {
				t.Fatalf("%+v, %v", caps, err)
			}
			warned := version == "1.16.0"
			if (caps.Warning != "") != warned || strings.Contains(log.String(), "WARN") != warned {
				t.Errorf("warning %q, log %q", caps.Warning, log.String())
			}
			m := fakeMachine(t, t.TempDir())
			m.Disks = []vmm.Disk{{Role: "root", Path: disk(t, "root"), ReadOnly: true}, {Role: "work", Path: disk(t, "work")}}
			r := boot(t, d, m)
			if err := ping(within(t, 10*time.Second), r); err != nil {
				t.Fatal(err)
			}
			if err := r.(vmm.Pauser).Pause(t.Context()); err != nil {
				t.Fatal(err)
			}
			dir := t.TempDir()
			if err := r.(vmm.Saver).Save(t.Context(), dir); err != nil {
				t.Fatal(err)
			}
			if err := r.Stop(t.Context()); err != nil {
				t.Fatal(err)
			}
			again, err := d.Restore(within(t, 20*time.Second), m, dir)
			if warned {
				if fault.KindOf(err) != fault.Precondition {
					t.Errorf("restored: %v", err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			stopAtEnd(t, again)
			if err := ping(within(t, 10*time.Second), again); err != nil {
				t.Error(err)
			}
		})
	}
}

// disk makes one.
func disk(t *testing.T, name string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name+".ext4")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// TestStartFails: Firecracker does not do what it is asked for, in all the ways there are.
func TestStartFails(t *testing.T) {
	spoil := func(on, what string) fakefc.Faults {
		return fakefc.Faults{API: []fakefc.APIFault{{On: on, Do: what}}}
	}
	const soon, enough = 4 * time.Second, 20 * time.Second // soon is enough to get to where it hangs, beside all the others
	for name, c := range map[string]struct {
		faults fakefc.Faults
		most   time.Duration
		kind   fault.Kind
		word   string
	}{
		"never listens":          {fakefc.Faults{NoAPI: true}, soon, fault.Timeout, "listen"},
		"hangs at once":          {spoil("GET", fakefc.Hang), soon, fault.Timeout, "GET /version"},
		"hangs half-way":         {spoil("PUT /vsock", fakefc.Hang), soon, fault.Timeout, "/vsock"},
		"hangs at the start":     {spoil("PUT /actions", fakefc.Hang), soon, fault.Timeout, "/actions"},
		"dies at once":           {spoil("GET", fakefc.Die), enough, fault.Unexpected, "signal"},
		"dies between two calls": {spoil("PUT /boot-source", fakefc.Die), enough, fault.Unexpected, "signal"},
		"dies within an answer":  {spoil("GET /version", fakefc.Cut), enough, fault.Unexpected, "signal"},
		"ends before it listens": {fakefc.Faults{Exit: 148}, enough, fault.Unexpected, "filter of system calls"},
		"dies at the start":      {spoil("PUT /actions", fakefc.Die), enough, fault.Unexpected, "signal"},
		"wrong JSON":             {spoil("GET /version", fakefc.WrongJSON), enough, fault.Unexpected, "not understood"},
		"no HTTP":                {spoil("PUT /machine-config", fakefc.Garbage), enough, fault.Unexpected, "/machine-config"},
		"10 MB":                  {spoil("PUT /machine-config", fakefc.Huge), enough, fault.Unexpected, "bytes"},
		"10 MB of version":       {spoil("GET /version", fakefc.Huge), enough, fault.Unexpected, "bytes"},
		"too many connections":   {spoil("PUT /entropy", fakefc.Busy), enough, fault.Unexpected, "Too many open connections"},
		"refuses":                {spoil("PUT /machine-config", fakefc.Refuse), enough, fault.Unexpected, "Refused for a test."},
		"no right on KVM":        {fakefc.Faults{KVM: syscall.EACCES}, enough, fault.Precondition, "group kvm"},
		"no KVM":                 {fakefc.Faults{KVM: syscall.ENOENT}, enough, fault.Precondition, "firmware"},
		"KVM is another's":       {fakefc.Faults{KVM: syscall.EBUSY}, enough, fault.Precondition, "VirtualBox"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			m := fakeMachine(t, t.TempDir())
			refused(t, onFake(fctest.Faulty(t, c.faults))(t), m, c.most, c.kind, c.word)
			// What was wrong with the program is not the machine's fault.
			r := boot(t, onFake(fctest.Fake(t))(t), m)
			if err := ping(within(t, 10*time.Second), r); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSlow: an answer that takes its time is waited for.
func TestSlow(t *testing.T) {
	d := onFake(fctest.Faulty(t, fakefc.Faults{API: []fakefc.APIFault{{On: "PUT", Do: fakefc.Slow, For: 100 * time.Millisecond}}}))(t)
	if err := ping(within(t, 10*time.Second), boot(t, d, fakeMachine(t, t.TempDir()))); err != nil {
		t.Error(err)
	}
}

// TestBadMachines: what Firecracker would refuse, or the host.
func TestBadMachines(t *testing.T) {
	hosttest.NetNS(t)
	d := onFake(fctest.Fake(t))(t)
	gone, readOnly := filepath.Join(t.TempDir(), "gone"), disk(t, "read-only")
	foreign, text := fctest.Kernel(), []byte("a text")
	foreign[0x12] = 183
	bz := make([]byte, 1024)
	copy(bz[0x202:], "HdrS")
	kernel := func(content []byte) func(*vmm.Machine) {
		return func(m *vmm.Machine) {
			m.Kernel = filepath.Join(m.Dir, "another")
			if err := os.WriteFile(m.Kernel, content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		spoil func(*vmm.Machine)
		kind  fault.Kind
		word  string
	}{
		"text for a kernel":  {kernel(text), fault.Precondition, "format"},
		"empty kernel":       {kernel(nil), fault.Precondition, "kernel"},
		"bzImage":            {kernel(bz), fault.Precondition, "bzimage"},
		"another's kernel":   {kernel(foreign), fault.Precondition, "kernel"},
		"cut kernel":         {kernel(fctest.Kernel()[:8]), fault.Precondition, "kernel"},
		"no drive":           {func(m *vmm.Machine) { m.Disks = []vmm.Disk{{Role: "root", Path: gone}} }, fault.Precondition, "root disk"},
		"drive is directory": {func(m *vmm.Machine) { m.Disks = []vmm.Disk{{Role: "root", Path: m.Dir}} }, fault.Precondition, "root disk"},
		"two of one role": {func(m *vmm.Machine) {
			m.Disks = []vmm.Disk{{Role: "a", Path: readOnly}, {Role: "a", Path: readOnly}}
		}, fault.Usage, "role"},
		"role that is no id": {func(m *vmm.Machine) { m.Disks = []vmm.Disk{{Role: "a-b", Path: readOnly}} }, fault.Usage, "role"},
		"no TAP":             {func(m *vmm.Machine) { m.NICs = []vmm.NIC{{TAP: "nowhere", MAC: "52:54:00:00:00:01"}} }, fault.Precondition, "network device"},
		"33 CPUs":            {func(m *vmm.Machine) { m.CPUs = 33 }, fault.Usage, "CPUs"},
		"no memory":          {func(m *vmm.Machine) { m.MemoryBytes = 0 }, fault.Usage, "memory"},
		"half a MiB":         {func(m *vmm.Machine) { m.MemoryBytes += 1 << 19 }, fault.Usage, "memory"},
		"all memory":         {func(m *vmm.Machine) { m.MemoryBytes = 1 << 60 }, fault.Precondition, "memory"},
		"long command line":  {func(m *vmm.Machine) { m.Cmdline = []string{strings.Repeat("x", 2048)} }, fault.Usage, "command line"},
	} {
		t.Run(name, func(t *testing.T) {
			m := fakeMachine(t, t.TempDir())
			c.spoil(&m)
			refused(t, d, m, 20*time.Second, c.kind, c.word)
		})
	}
}

// TestTAPBusy: two machines cannot have one TAP device.
func TestTAPBusy(t *testing.T) {
	onBoth(t, func(t *testing.T, b bench) {
		hosttest.NetNS(t)
		hosttest.TAP(t, "tap-x")
		one, two := b.machine(t, fctest.Count), b.machine(t, fctest.Count)
		one.NICs = []vmm.NIC{{TAP: "tap-x", MAC: "52:54:00:00:00:01"}}
		two.NICs = []vmm.NIC{{TAP: "tap-x", MAC: "52:54:00:00:00:02"}}
		boot(t, b.driver(t), one)
		refused(t, b.driver(t), two, 20*time.Second, fault.Conflict, "network device")
	})
}

// TestVsockPeers: what answers on the guest's channel is not what it should be.
func TestVsockPeers(t *testing.T) {
	for name, c := range map[string]struct {
		vsock string
		most  time.Duration
		kind  fault.Kind
	}{
		"hangs up": {"close", 700 * time.Millisecond, fault.Timeout}, // as a guest that has not booted: it is waited for
		"silent":   {"silent", 700 * time.Millisecond, fault.Timeout},
		"garbage":  {"garbage", 20 * time.Second, fault.Unexpected},
		"endless":  {"endless", 20 * time.Second, fault.Unexpected},
	} {
		t.Run(name, func(t *testing.T) {
			r := boot(t, onFake(fctest.Faulty(t, fakefc.Faults{Vsock: c.vsock}))(t), fakeMachine(t, t.TempDir()))
			begin := time.Now()
			conn, err := r.DialGuest(within(t, c.most))
			if err == nil {
				_ = conn.Close()
			}
			t.Logf("after %s: %v", time.Since(begin).Round(time.Millisecond), err)
			if fault.KindOf(err) != c.kind {
				t.Errorf("kind %v, want %v: %v", fault.KindOf(err), c.kind, err)
			}
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

// TestExits: how a machine ends is told by code, log and console together.
func TestExits(t *testing.T) {
	for name, c := range map[string]struct {
		arg    string
		kind   vmm.ExitKind
		detail string
	}{
		"panic":               {fakefc.ArgPanic, vmm.ExitPanic, "Kernel panic - not syncing"},
		"triple fault":        {fakefc.ArgTripleFault, vmm.ExitCrash, "KVM_EXIT"},
		"fault with code 0":   {fakefc.ArgLostFault, vmm.ExitCrash, "KVM_EXIT"},
		"Firecracker crashes": {fakefc.ArgDieAfter + "50ms", vmm.ExitCrash, "SIGSEGV"},
	} {
		t.Run(name, func(t *testing.T) {
			m := fakeMachine(t, t.TempDir())
			m.Cmdline = []string{c.arg}
			r := boot(t, onFake(fctest.Fake(t))(t), m)
			ended(t, r, c.kind, c.detail)
		})
	}
}

// ended waits for the end of a machine.
func ended(t *testing.T, r vmm.Running, kind vmm.ExitKind, detail string) {
	t.Helper()
	select {
	case <-r.Done():
	case <-time.After(20 * time.Second):
		t.Fatal("it does not end")
	}
	if exit := r.Exit(); exit.Kind != kind || !strings.Contains(exit.Detail, detail) {
		t.Errorf("%+v, want %s with %q", exit, kind, detail)
	}
}

// TestHungMachine: a Firecracker that answers no more can be adopted and stopped.
func TestHungMachine(t *testing.T) {
	m := fakeMachine(t, t.TempDir())
	// The first request after the start hangs.
	d := onFake(fctest.Faulty(t, fakefc.Faults{API: []fakefc.APIFault{{On: "PATCH", Do: fakefc.Hang}}}))(t)
	r := boot(t, d, m)
	if err := r.(vmm.Pauser).Pause(within(t, 300*time.Millisecond)); fault.KindOf(err) != fault.Timeout {
		t.Errorf("pause: %v", err)
	}
	if err := r.Stop(t.Context()); err != nil {
		t.Errorf("stop: %v", err)
	}
	nothingLeft(t, d, m)
}

// TestDiesWhileAsked: the caller hears of it at once.
func TestDiesWhileAsked(t *testing.T) {
	for _, how := range []string{fakefc.Die, fakefc.Cut} {
		m := fakeMachine(t, t.TempDir())
		d := onFake(fctest.Faulty(t, fakefc.Faults{API: []fakefc.APIFault{{On: "PATCH", Do: how}}}))(t)
		r := boot(t, d, m)
		if err := r.(vmm.Pauser).Pause(within(t, 5*time.Second)); fault.KindOf(err) != fault.Conflict {
			t.Errorf("pause of one that does %q: %v", how, err)
		}
		ended(t, r, vmm.ExitKilled, "")
		nothingLeft(t, d, m)
	}
}

// TestSocketsInTheWay: what a dead machine left is removed; what lives is not.
func TestSocketsInTheWay(t *testing.T) {
	onBoth(t, func(t *testing.T, b bench) {
		m := b.machine(t, fctest.Count)
		for _, name := range []string{firecracker.APISocket, vmm.GuestSocket} {
			if err := os.WriteFile(filepath.Join(m.Dir, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		r := boot(t, b.driver(t), m)
		second, err := b.driver(t).Start(within(t, 5*time.Second), m)
		if err == nil {
			stopAtEnd(t, second)
		}
		if fault.KindOf(err) != fault.Conflict {
			t.Errorf("a second start: %v", err)
		}
		if err := syscall.Kill(r.Handle().PID, syscall.SIGKILL); err != nil {
			t.Fatal(err)
		}
		ended(t, r, vmm.ExitKilled, "")
		if err := boot(t, b.driver(t), m).Stop(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestRestoreFails: what goes wrong at the one request of a restore leaves nothing behind, and what was saved is good
// for another try.
func TestRestoreFails(t *testing.T) {
	saver := onFake(fctest.Fake(t))(t)
	m := fakeMachine(t, t.TempDir())
	dir := t.TempDir()
	r := boot(t, saver, m)
	if err := ping(within(t, 10*time.Second), r); err != nil {
		t.Fatal(err)
	}
	if err := r.(vmm.Pauser).Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.(vmm.Saver).Save(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := r.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		faults fakefc.Faults
		most   time.Duration
		kind   fault.Kind
	}{
		"hangs":    {fakefc.Faults{API: []fakefc.APIFault{{On: "PUT /snapshot/load", Do: fakefc.Hang}}}, 500 * time.Millisecond, fault.Timeout},
		"dies":     {fakefc.Faults{API: []fakefc.APIFault{{On: "PUT /snapshot/load", Do: fakefc.Die}}}, 10 * time.Second, fault.Unexpected},
		"refuses":  {fakefc.Faults{API: []fakefc.APIFault{{On: "PUT /snapshot/load", Do: fakefc.Refuse}}}, 10 * time.Second, fault.Unexpected},
		"no right": {fakefc.Faults{KVM: syscall.EACCES}, 10 * time.Second, fault.Precondition},
	} {
		t.Run(name, func(t *testing.T) {
			d := onFake(fctest.Faulty(t, c.faults))(t)
			r, err := d.(vmm.Restorer).Restore(within(t, c.most), m, dir)
			if err == nil {
				stopAtEnd(t, r)
			}
			t.Logf("%.300v", err)
			if fault.KindOf(err) != c.kind {
				t.Errorf("kind %v, want %v: %v", fault.KindOf(err), c.kind, err)
			}
			nothingLeft(t, d, m)
		})
	}
	again, err := saver.(vmm.Restorer).Restore(within(t, 10*time.Second), m, dir)
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, again)
	if err := ping(within(t, 10*time.Second), again); err != nil {
		t.Error(err)
	}
}
