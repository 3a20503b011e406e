// Package vmmtest is the conformance suite of the drivers: what the engine relies on, run against a
// real driver. The fake may stand in for the others because it passes as well.
package vmmtest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/hosttest"
	"banger/internal/vmm"
)

// Target is a driver under test and what the suite must know of it.
type Target struct {
	// New returns a new driver value each time, as a restarted daemon has.
	New func(testing.TB) vmm.Driver
	// Machine describes a new machine in dir, which exists and is empty. Its guest's agent answers. The guest has
	// the programs echo, count (says how often it was called since the boot) and chatter (never stops talking).
	Machine func(t testing.TB, dir string) vmm.Machine
	// BootTimeout bounds the wait for the agent, from Start.
	BootTimeout time.Duration
	// Hang are kernel arguments with which the agent never answers.
	Hang []string
	// Panic are kernel arguments with which the guest's kernel panics, and PanicText is a part of the
	// line it says then.
	Panic     []string
	PanicText string
	// Break changes a machine so that the VMM itself refuses it.
	Break func(*vmm.Machine)
	// Cannot names parts of the suite (a sub-test's name) that do not hold for this target, with the
	// reason, which the test run prints.
	Cannot map[string]string
}

// ends bounds how long a machine may take to end, or to be seen to have ended.
const ends = 20 * time.Second

// Run runs the suite.
func Run(t *testing.T, target Target) {
	parts := []struct {
		name string
		run  func(*testing.T, Target)
	}{
		{"Life", testLife},
		{"Reboot", testReboot},
		{"Killed", testKilled},
		{"KilledUnwatched", testKilledUnwatched},
		{"StopWhileBooting", testStopWhileBooting},
		{"StopWithoutTime", testStopWithoutTime},
		{"Panic", testPanic},
		{"StartRefused", testStartRefused},
		{"StartCancelled", testStartCancelled},
		{"Missing", testMissing},
		{"Saved", testSaved},
		{"SavedMapped", testSavedMapped},
		{"SavedUnfit", testSavedUnfit},
		{"SaveFails", testSaveFails},
		{"SaveKilled", testSaveKilled},
	}
	known := map[string]bool{}
	for _, p := range parts {
		known[p.name] = true
		t.Run(p.name, func(t *testing.T) {
			if why := target.Cannot[p.name]; why != "" {
				t.Skip("this target cannot: " + why)
			}
			verifyNothingLeaks(t)
			p.run(t, target)
		})
	}
	for name := range target.Cannot {
		if !known[name] {
			t.Errorf("the target cannot %q, which is no part of the suite", name)
		}
	}
}

// verifyNothingLeaks compares goroutines and descriptors before and after t.
func verifyNothingLeaks(t *testing.T) {
	t.Helper()
	before, goroutines := descriptors(t), goleak.IgnoreCurrent()
	t.Cleanup(func() {
		if t.Failed() {
			return
		}
		hosttest.NoGoroutines(t, goroutines)
		if after := descriptors(t); len(after) > len(before) {
			t.Errorf("descriptors before: %v\nafter: %v", before, after)
		}
	})
}

func descriptors(t *testing.T) []string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	var open []string
	for _, e := range entries {
		if to, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil && !strings.HasPrefix(to, "anon_inode:[event") {
			open = append(open, e.Name()+" "+to)
		}
	}
	return open
}

// fixture is one machine and its driver.
type fixture struct {
	Target
	t *testing.T
	d vmm.Driver
	m vmm.Machine
}

// newFixture makes a machine. Its directory's name is longer than a Unix socket's address.
func newFixture(t *testing.T, target Target, args ...string) *fixture {
	t.Helper()
	dir := filepath.Join(t.TempDir(), strings.Repeat("long/", 30))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	f := &fixture{Target: target, t: t, d: target.New(t), m: target.Machine(t, dir)}
	f.m.Cmdline = append(append([]string{}, f.m.Cmdline...), args...)
	t.Cleanup(func() {
		if t.Failed() {
			f.evidence()
		}
	})
	return f
}

// evidence prints the end of the machine's logs.
func (f *fixture) evidence() {
	for _, name := range []string{vmm.CommandFile, vmm.VMMLog, vmm.SerialLog} {
		text, err := os.ReadFile(filepath.Join(f.m.Dir, name))
		if err != nil {
			continue
		}
		f.t.Logf("%s:\n%s", name, text[max(0, len(text)-4000):])
	}
}

// start starts the machine; it is stopped at the end of the test.
func (f *fixture) start() vmm.Running {
	f.t.Helper()
	r, err := f.d.Start(f.ctx(), f.m)
	if err != nil {
		f.t.Fatalf("start: %v", err)
	}
	f.stopAtEnd(r)
	return r
}

func (f *fixture) stopAtEnd(r vmm.Running) {
	f.t.Cleanup(func() {
		if err := r.Stop(context.Background()); err != nil && fault.KindOf(err) != fault.Conflict {
			f.t.Errorf("stop at the end: %v", err)
		}
		if err := r.Close(); err != nil {
			f.t.Errorf("close at the end: %v", err)
		}
	})
}

func (f *fixture) ctx() context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), f.BootTimeout)
	f.t.Cleanup(cancel)
	return ctx
}

func (f *fixture) adopt(h vmm.Handle) vmm.Running {
	f.t.Helper()
	r, err := f.New(f.t).Adopt(f.ctx(), f.m, h)
	if err != nil {
		f.t.Fatalf("adopt: %v", err)
	}
	f.stopAtEnd(r)
	return r
}

// ping waits for the agent and returns the boot id.
func (f *fixture) ping(r vmm.Running) string {
	f.t.Helper()
	c := guest.NewClient(r.DialGuest)
	defer c.Close()
	answer, err := c.Ping(f.ctx(), &agentv1.PingRequest{})
	if err != nil {
		f.t.Fatalf("ping: %v", err)
	}
	return answer.GetBootId()
}

// shutdown asks the agent to end the guest. Its answer may be lost when the machine ends.
func (f *fixture) shutdown(r vmm.Running, mode agentv1.ShutdownRequest_Mode) {
	f.t.Helper()
	c := guest.NewClient(r.DialGuest)
	defer c.Close()
	_, err := c.Shutdown(f.ctx(), &agentv1.ShutdownRequest{Mode: mode})
	if err == nil {
		return
	}
	select {
	case <-r.Done():
		f.t.Logf("shutdown: the answer was lost: %v", err)
	case <-time.After(ends):
		f.t.Fatalf("shutdown: %v", err)
	}
}

// exec runs a program in the guest and returns stdout and the exit code.
func (f *fixture) exec(r vmm.Running, argv ...string) (string, int) {
	f.t.Helper()
	c := guest.NewClient(r.DialGuest)
	defer c.Close()
	stream, err := c.Exec(f.ctx())
	if err != nil {
		f.t.Fatalf("exec %q: %v", argv, err)
	}
	defer stream.CloseResponse()
	err = stream.Send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{Argv: argv}}})
	if err = errors.Join(err, stream.CloseRequest()); err != nil {
		f.t.Fatalf("exec %q: %v", argv, err)
	}
	var out strings.Builder
	for {
		answer, err := stream.Receive()
		if err != nil {
			f.t.Fatalf("exec %q: %v", argv, err)
		}
		out.Write(answer.GetStdout())
		if e := answer.GetExited(); e != nil {
			return out.String(), int(e.GetCode())
		}
	}
}

// waitExit waits for the end of r and compares how it ended.
func (f *fixture) waitExit(r vmm.Running, within time.Duration, want vmm.ExitKind) vmm.Exit {
	f.t.Helper()
	select {
	case <-r.Done():
	case <-time.After(within):
		f.t.Fatalf("the machine does not end within %s", within)
	}
	if got := r.Exit(); got.Kind != want {
		f.t.Errorf("the machine ended as %q (%s), want %q", got.Kind, got.Detail, want)
	}
	return r.Exit()
}

// sockets lists the sockets in the machine's directory.
func (f *fixture) sockets() []string {
	f.t.Helper()
	entries, err := os.ReadDir(f.m.Dir)
	if err != nil {
		f.t.Fatal(err)
	}
	var found []string
	for _, e := range entries {
		if e.Type() == os.ModeSocket {
			found = append(found, e.Name())
		}
	}
	return found
}

// nothingLeft checks that no process and no socket of the machine remains.
func (f *fixture) nothingLeft() {
	f.t.Helper()
	if left := f.sockets(); len(left) > 0 {
		f.t.Errorf("sockets left: %v", left)
	}
	r, err := f.New(f.t).Adopt(f.ctx(), f.m, vmm.Handle{})
	if err == nil {
		f.t.Errorf("process %d is left", r.Handle().PID)
		f.stopAtEnd(r)
		return
	}
	if fault.KindOf(err) != fault.NotFound {
		f.t.Errorf("looking for a process left: %v", err)
	}
}
