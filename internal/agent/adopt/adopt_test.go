package adopt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/identity"
	"banger/internal/disk"
	"banger/internal/hosttest/need"
)

func TestJournalOfATemplateIsRemoved(t *testing.T) {
	root := t.TempDir()
	id, other := strings.Repeat("a", 32), strings.Repeat("b", 32)
	for _, dir := range []string{"run/log/journal/" + id, "var/log/journal/" + id, "var/log/journal/" + other} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, dir, "system.journal"), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for range 2 {
		if err := removeJournal(root, id); err != nil {
			t.Fatal(err)
		}
	}
	if err := removeJournal(root, ""); err != nil { // an image without a machine id
		t.Fatal(err)
	}
	left, err := filepath.Glob(filepath.Join(root, "*/log/journal/*/*"))
	if err != nil || len(left) != 1 || !strings.Contains(left[0], other) {
		t.Errorf("left are %v, %v", left, err)
	}
}

// What users have beside it stays.
func TestDropInIsRemovedAlone(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "x.service.d")
	ours, users := filepath.Join(dir, "ours.conf"), filepath.Join(dir, "users.conf")
	for _, files := range [][]string{{ours, users}, {ours}} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, f := range files {
			if err := os.WriteFile(f, nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := removeDropIn(ours); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(users); (err == nil) != (len(files) == 2) {
			t.Errorf("the user's: %v", err)
		}
		if err := os.RemoveAll(users); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("its directory is left: %v", err)
	}
}

// The file with the boot id is mounted: it must stay the same one.
func TestBootIDIsChangedInPlace(t *testing.T) {
	need.Root(t) // it is read-only
	dir := t.TempDir()
	path := filepath.Join(dir, "boot_id")
	first, second := newUUID()+"\n", newUUID()+"\n"
	if first == second || !regexp.MustCompile(`^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}\n$`).MatchString(first) {
		t.Fatalf("uuids %q, %q", first, second)
	}
	if err := identity.File(dir, "boot_id", first, 0o444); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := identity.File(dir, "boot_id", second, 0o444); err != nil {
		t.Fatal(err)
	}
	after, err := os.Stat(path)
	if err != nil || !os.SameFile(before, after) {
		t.Errorf("it became another file: %v", err)
	}
	if b, err := os.ReadFile(path); string(b) != second || err != nil {
		t.Errorf("it says %q, %v", b, err)
	}
}

func TestExt4Blocks(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := disk.CreateExt4(t.Context(), path, 1<<30, "disk"); err != nil {
		t.Fatal(err)
	}
	if got, err := ext4Blocks(path); got != 1<<30/4096 || err != nil {
		t.Errorf("got %d blocks, %v", got, err)
	}
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ext4Blocks(path); err == nil || !strings.Contains(err.Error(), "no ext4") {
		t.Errorf("zeros are taken for ext4: %v", err)
	}
	if err := os.WriteFile(path, make([]byte, 100), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ext4Blocks(path); err == nil {
		t.Error("what is shorter than a superblock is taken for ext4")
	}
}

func TestDaemonPID(t *testing.T) {
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	own := strings.TrimSpace(string(comm))
	file := filepath.Join(t.TempDir(), "pid")
	for text, want := range map[string]int{"": 0, "x": 0, "1": 0, "-5": 0, "4194304999": 0, "own": os.Getpid()} {
		if text == "own" {
			text = strconv.Itoa(os.Getpid())
		}
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if got := daemonPID(file, own); got != want {
			t.Errorf("%q: pid %d, want %d", text, got, want)
		}
		if got := daemonPID(file, "other"); got != 0 {
			t.Errorf("%q: pid %d is taken for another program", text, got)
		}
	}
	if got := daemonPID(file+"none", own); got != 0 {
		t.Errorf("without a file: %d", got)
	}
}

// A disk that does not answer holds up neither the caller past its deadline nor a second sync.
func TestSyncThatHangs(t *testing.T) {
	dead := make(chan struct{})
	g := &Guest{Dir: t.TempDir(), Systemd: func() bool { return false }, syncing: dead}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := g.Quiesce(ctx, &agentv1.QuiesceRequest{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("got %v", err)
	}
	if g.syncing != dead {
		t.Error("another sync was begun behind the one that hangs")
	}
	close(dead)
	g.turn.Lock()
	ctx, cancel = context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if _, err := g.Quiesce(ctx, &agentv1.QuiesceRequest{}); !errors.Is(err, errBusy) || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("two at a time: %v", err)
	}
	if _, err := g.Adopt(ctx, &agentv1.AdoptRequest{}); !errors.Is(err, errBusy) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("two at a time: %v", err)
	}
	g.turn.Unlock()
}

// Whoever saves a clone the moment it has answered waits until its programs run, and no longer than a moment.
func TestQuiesceWaitsForItsTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s still
		g := s.guest(t)
		g.turn.Lock()
		time.AfterFunc(startWait/2, g.turn.Unlock)
		if _, err := g.Quiesce(t.Context(), &agentv1.QuiesceRequest{}); err != nil {
			t.Error(err)
		}
		g.turn.Lock()
		if _, err := g.Quiesce(t.Context(), &agentv1.QuiesceRequest{}); !errors.Is(err, errBusy) {
			t.Errorf("got %v", err)
		}
		g.turn.Unlock()
	})
}

// Programs that run as whom the host says lose nothing when it has to ask twice.
func TestAdoptedTwice(t *testing.T) {
	id := func(name string) *agentv1.GuestConfig { return &agentv1.GuestConfig{Hostname: name, UnixNanos: 1} }
	var s still
	g := s.guest(t)
	if g.isAlready(id("web")) || g.isAlready(&agentv1.GuestConfig{}) {
		t.Error("a guest that was told nothing is somebody")
	}
	g.became = id("web")
	if !g.isAlready(id("web")) || g.isAlready(id("db")) {
		t.Error("a guest does not know who it is")
	}
	if err := g.hold(t.Context(), forCopy); err != nil {
		t.Fatal(err)
	}
	if g.isAlready(id("web")) {
		t.Error("programs that stand still are taken for such that run")
	}
	if err := g.release(); err != nil {
		t.Error(err)
	}
}

// A disk that is dead does not keep programs standing still for ever.
func TestTakingOverBesideADeadDisk(t *testing.T) {
	var s still
	g := s.guest(t)
	g.Disks = []string{"/dev/null/no directory", "/proc"}
	if err := errors.Join(g.begin(forCopy, ""), g.note("/user.slice")); err != nil {
		t.Fatal(err)
	}
	if err := g.TakeOver(); err == nil || s.thawed != 1 || g.held != nil {
		t.Errorf("thawed %d times, %v", s.thawed, err)
	}
}

// still is a Guest's Freeze that counts who holds the programs.
type still struct {
	frozen, thawed int
	err            error
	noted          []string // by an agent that died
	guards         int      // that wait for its death
	stuck          int      // how often they are not let go
	machine        string
}

func (s *still) freeze(_ context.Context, guard int, note func(string) error) (func() error, error) {
	if s.err != nil {
		return nil, s.err
	}
	if guard != guardPID {
		return nil, fmt.Errorf("the guard is %d", guard)
	}
	s.frozen++
	return s.let, note("/user.slice")
}

func (s *still) thaw(groups []string) error {
	s.noted = groups
	return s.let()
}

func (s *still) let() error {
	if s.stuck > 0 {
		s.stuck--
		return errStuck
	}
	s.thawed++
	return nil
}

const guardPID = 7

var errStuck = errors.New("stuck")

// guest is a Guest whose programs are s.
func (s *still) guest(t *testing.T) *Guest {
	return &Guest{
		Dir: t.TempDir(), Freeze: s.freeze, Thaw: s.thaw, Machine: func() string { return s.machine },
		StartGuard: func(context.Context) (int, func(), error) {
			s.guards++
			return guardPID, func() { s.guards-- }, nil
		},
	}
}

// A program that is started while all stand still would hold up the agent itself.
func TestNoProgramIsStartedWhileAllStandStill(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s still
		g := s.guest(t)
		starting := g.Starting()
		starting.Lock()
		if err := g.hold(t.Context(), forCopy); !errors.Is(err, context.DeadlineExceeded) || s.frozen != 0 {
			t.Fatalf("frozen %d times while a program was being started, %v", s.frozen, err)
		}
		starting.Unlock()
		if err := g.hold(t.Context(), forCopy); err != nil {
			t.Fatal(err)
		}
		if g.starting.TryRLock() {
			t.Fatal("a program may start")
		}
		if err := errors.Join(g.release(), g.release()); err != nil || s.thawed != 1 {
			t.Errorf("thawed %d times, %v", s.thawed, err)
		}
		s.err = errors.New("no")
		if err := g.hold(t.Context(), forCopy); !errors.Is(err, s.err) {
			t.Errorf("got %v", err)
		}
		starting.Lock() // for good, if one of them had kept it
		defer starting.Unlock()
	})
}

// A host that is heard of no more keeps programs standing still for a while only, and never what the next one holds.
func TestProgramsRunOnByThemselves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s still
		g := s.guest(t)
		g.turn.Lock()
		defer g.turn.Unlock()
		pass := func(d time.Duration) {
			g.turn.Unlock()
			time.Sleep(d)
			synctest.Wait()
			g.turn.Lock()
		}
		for range 2 {
			if err := g.hold(t.Context(), forCopy); err != nil {
				t.Fatal(err)
			}
			pass(holdMost / 2)
		}
		if s.frozen != 2 || s.thawed != 1 {
			t.Errorf("frozen %d times, thawed %d times", s.frozen, s.thawed)
		}
		pass(time.Nanosecond)
		if s.thawed != 1 {
			t.Error("the first one's time let go what the second one holds")
		}
		pass(holdMost / 2)
		if s.thawed != 2 || g.held != nil || !g.late {
			t.Errorf("thawed %d times", s.thawed)
		}
		if err := g.hold(t.Context(), forTemplate); err != nil { // it waits for its clones
			t.Fatal(err)
		}
		pass(2 * holdMost)
		if s.thawed != 2 {
			t.Error("a template let its programs go")
		}
		if err := g.hold(t.Context(), forCopy); err != nil {
			t.Fatal(err)
		}
		s.machine = "the copy's" // and here it goes on
		pass(2 * holdMost)
		if s.thawed != 3 || g.late {
			t.Errorf("a copy let its programs go before it was told who it is: %d", s.thawed)
		}
		if err := g.release(); err != nil || s.thawed != 4 || s.guards != 0 {
			t.Errorf("told, and thawed %d times, %d guards, %v", s.thawed, s.guards, err)
		}
	})
}

// An agent that dies leaves a guest that goes on: at once, or, when it might be somebody else by now, when it is told.
func TestTheNextAgentTakesOver(t *testing.T) {
	for _, c := range []struct {
		what, purpose, machine string
		told, goesOn           bool
	}{
		{"the source of a copy", forCopy, "same", false, true},
		{"a copy", forCopy, "other", false, false},
		{"a template", forTemplate, "same", false, false},
		{"a template's clone", forTemplate, "other", false, false},
		{"a template's clone that rests", forTemplate, "other", true, true},
	} {
		s := still{machine: "same"}
		dead := s.guest(t)
		if err := dead.hold(t.Context(), c.purpose); err != nil {
			t.Fatal(err)
		}
		s.machine = c.machine
		if c.told {
			if err := dead.note(toldLine); err != nil {
				t.Fatal(err)
			}
		}
		if s.guards != 1 {
			t.Errorf("%s: %d guards", c.what, s.guards)
		}
		next := s.guest(t)
		next.Dir = dead.Dir
		if err := next.TakeOver(); err != nil || (s.thawed == 1) != c.goesOn || c.goesOn && !slices.Equal(s.noted, []string{"/user.slice"}) {
			t.Errorf("%s: thawed %d times, %v, %v", c.what, s.thawed, s.noted, err)
		}
		if next.late != (c.goesOn && !c.told) {
			t.Errorf("%s: a copy of it would be late: %v", c.what, next.late)
		}
		if _, err := next.Quiesce(t.Context(), &agentv1.QuiesceRequest{}); errors.Is(err, errUntold) == c.goesOn {
			t.Errorf("%s is saved: %v", c.what, err)
		}
		if held := !next.starting.TryRLock(); held == c.goesOn {
			t.Errorf("%s: programs may start: %v", c.what, !held)
		}
		if holds, err := next.Holds(); holds == c.goesOn || err != nil {
			t.Errorf("%s: the guard stays: %v, %v", c.what, holds, err)
		}
		if err := next.release(); err != nil || s.thawed != 1 {
			t.Errorf("%s, told who it is: thawed %d times, %v", c.what, s.thawed, err)
		}
		if left, err := next.left(); left != nil || err != nil {
			t.Errorf("%s: the record is left: %+v, %v", c.what, left, err)
		}
	}
}

// The next agent knows whose journal ends.
func TestTheNextAgentKnowsTheSource(t *testing.T) {
	s := still{machine: "source"}
	dead := s.guest(t)
	if err := errors.Join(dead.hold(t.Context(), forCopy), dead.note(wasLine+"0a")); err != nil {
		t.Fatal(err)
	}
	s.machine = "copy"
	next := s.guest(t)
	next.Dir = dead.Dir
	if err := next.TakeOver(); err != nil || next.was == nil || *next.was != "0a" {
		t.Errorf("was %v, %v", next.was, err)
	}
	if err := next.release(); err != nil || !slices.Equal(s.noted, []string{"/user.slice"}) {
		t.Errorf("let go %q, %v", s.noted, err)
	}
}

// A template that is held does so for its clones: who asks again does not let them go.
func TestWhoWasNotToldIsNotSaved(t *testing.T) {
	var s still
	g := s.guest(t)
	if err := g.hold(t.Context(), forTemplate); err != nil {
		t.Fatal(err)
	}
	for _, r := range []*agentv1.QuiesceRequest{{Hold: true}, {ForTemplate: true}, {}} {
		if _, err := g.Quiesce(t.Context(), r); !errors.Is(err, errUntold) || s.thawed != 0 {
			t.Errorf("%v: thawed %d times, %v", r, s.thawed, err)
		}
	}
	g.held.told = true // it rests
	if _, err := g.Quiesce(t.Context(), &agentv1.QuiesceRequest{Hold: true}); err != nil || s.thawed != 1 || s.frozen != 2 {
		t.Errorf("thawed %d times, %v", s.thawed, err)
	}
	if err := g.release(); err != nil {
		t.Error(err)
	}
}

func TestAnAgentThatDiedEarly(t *testing.T) {
	var s still
	g := s.guest(t)
	if err := os.WriteFile(g.record(), []byte("copy"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := g.TakeOver(); err != nil || !g.starting.TryRLock() {
		t.Errorf("nobody goes on: %v", err)
	}
	if err := g.TakeOver(); err != nil { // nothing is left
		t.Error(err)
	}
}

// A kernel without control groups has programs that run on, which is told.
func TestWhatCannotBeHeldIsTold(t *testing.T) {
	s := still{err: fmt.Errorf("no groups: %w", errors.ErrUnsupported)}
	g := s.guest(t)
	r, err := g.Quiesce(t.Context(), &agentv1.QuiesceRequest{Hold: true})
	if err != nil || len(r.GetLacking()) != 1 || !strings.Contains(r.GetLacking()[0], "no groups") {
		t.Errorf("%v, %v", r, err)
	}
	if err := g.release(); err != nil {
		t.Error(err)
	}
}
