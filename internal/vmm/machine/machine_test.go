package machine

import (
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"banger/internal/fault"
	"banger/internal/hosttest"
	"banger/internal/system"
	"banger/internal/vmm"
)

func TestMain(m *testing.M) { hosttest.Main(m) }

// holder starts a process that holds the lock of dir.
func holder(t *testing.T, dir string) *system.Process {
	t.Helper()
	lock, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer lock.Close()
	p, err := system.Start(system.StartOptions{Path: "/bin/sleep", Args: []string{"100"}, ExtraFiles: []*os.File{lock}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { Kill(p) })
	return p
}

func TestTheProcessHoldsTheLock(t *testing.T) {
	dir := t.TempDir()
	if _, err := Find(dir, vmm.Handle{}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("no lock yet: %v", err)
	}
	p := holder(t, dir)
	if _, err := Lock(dir); fault.KindOf(err) != fault.Conflict {
		t.Errorf("locked twice: %v", err)
	}
	found, err := Find(dir, vmm.Handle{})
	if err != nil || found.PID() != p.PID() {
		t.Fatalf("found %v, %v", found, err)
	}
	defer found.Close()
	other := t.TempDir()
	holder(t, other)
	if _, err := Find(other, vmm.Handle{PID: p.PID(), StartTime: p.StartTime()}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a handle of another machine's process: %v", err)
	}
	if again, err := Find(dir, vmm.Handle{}); err != nil || again.PID() != p.PID() {
		t.Errorf("with two machines: %v, %v", again, err)
	} else {
		again.Close()
	}

	leftover := filepath.Join(dir, "x.sock")
	if err := os.WriteFile(leftover, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	RemoveIfUnlocked(dir, []string{"x.sock"})
	if _, err := os.Stat(leftover); err != nil {
		t.Errorf("what a living machine needs was removed: %v", err)
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if _, err := Find(dir, vmm.Handle{}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("after its end: %v", err)
	}
	RemoveIfUnlocked(dir, []string{"x.sock"})
	if _, err := os.Stat(leftover); !os.IsNotExist(err) {
		t.Errorf("what a dead machine left is there: %v", err)
	}
}

// Somebody who has forked and not yet executed a program has the lock for a moment, which may be long on a loaded host.
func TestALockOfNobodysIsWaitedFor(t *testing.T) {
	dir := t.TempDir()
	copied, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	time.AfterFunc(2*lockPatience, func() { _ = copied.Close() })
	lock, err := Lock(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := lock.Close(); err != nil {
		t.Error(err)
	}
}

// A backup that reads the directory is no machine, and so is never ended as one.
func TestAReaderOfTheLockFileIsNoMachine(t *testing.T) {
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, LockFile), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(filepath.Join(dir, LockFile))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	reader, err := system.Start(system.StartOptions{Path: "/bin/sleep", Args: []string{"100"}, ExtraFiles: []*os.File{f}})
	if err != nil {
		t.Fatal(err)
	}
	defer Kill(reader)
	for _, h := range []vmm.Handle{{}, {PID: reader.PID(), StartTime: reader.StartTime()}} {
		if p, err := Find(dir, h); fault.KindOf(err) != fault.NotFound {
			t.Errorf("handle %+v found %v, %v", h, p, err)
		}
	}
	p := holder(t, dir)
	found, err := Find(dir, vmm.Handle{})
	if err != nil || found.PID() != p.PID() {
		t.Fatalf("beside a reader it found %v, %v", found, err)
	}
	found.Close()
}

func TestTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	if lines := Tail(path, 3); lines != nil {
		t.Errorf("no file: %q", lines)
	}
	text := strings.Repeat("long ago\n", 20_000) + "one\r\n\nt\x1b]0;wo\u009b\nth\xffree"
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(Tail(path, 3), "|"); got != "one|t]0;wo|three" {
		t.Errorf("got %q", got)
	}
}

// TestCommandCanBeRunAgain: a shell reads back each argument as it was.
func TestCommandCanBeRunAgain(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(r *rapid.T) {
		args := rapid.SliceOfN(rapid.StringMatching(`[ -~]{0,12}`), 1, 4).Draw(r, "args")
		if err := WriteCommand(dir, append([]string{"/usr/bin/printf", `%s\n`}, args...)); err != nil {
			r.Fatal(err)
		}
		out, err := system.Run(t.Context(), system.Command{Path: "sh", Args: []string{filepath.Join(dir, vmm.CommandFile)}})
		if want := strings.Join(args, "\n") + "\n"; err != nil || string(out) != want {
			r.Fatalf("got %q, %v, want %q", out, err, want)
		}
	})
}

func TestCheckFiles(t *testing.T) {
	dir := t.TempDir()
	good := filepath.Join(dir, "file")
	if err := os.WriteFile(good, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
	empty := filepath.Join(dir, "empty")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m := vmm.Machine{Name: "web", Dir: dir, Kernel: good, Initramfs: "file", Disks: []vmm.Disk{{Role: "root", Path: good}}}
	if err := CheckFiles(m); err != nil {
		t.Error(err)
	}
	for what, spoil := range map[string]func(*vmm.Machine){
		"empty kernel":    func(m *vmm.Machine) { m.Kernel = empty },
		"kernel is a dir": func(m *vmm.Machine) { m.Kernel = dir },
		"no disk":         func(m *vmm.Machine) { m.Disks = []vmm.Disk{{Role: "work", Path: "gone"}} },
		"no directory":    func(m *vmm.Machine) { m.Dir = filepath.Join(dir, "gone") },
		"relative dir":    func(m *vmm.Machine) { m.Dir = "." },
	} {
		bad := m
		spoil(&bad)
		if err := CheckFiles(bad); fault.KindOf(err) != fault.Precondition {
			t.Errorf("%s: %v", what, err)
		}
	}
}

func TestStopOfADeafProcess(t *testing.T) {
	said := filepath.Join(t.TempDir(), "said")
	p, err := system.Start(system.StartOptions{
		Path: "/bin/sh", Args: []string{"-c", "trap '' TERM; echo deaf; while :; do sleep 1; done"}, NewSession: true, Log: said,
	})
	if err != nil {
		t.Fatal(err)
	}
	for len(Tail(said, 1)) == 0 {
		time.Sleep(5 * time.Millisecond)
	}
	m := New(Options{
		Dir: t.TempDir(), Process: p,
		Classify: func(s system.ExitStatus, stopped bool) vmm.Exit { return ClassifyStatus(s, stopped) },
	})
	begin := time.Now()
	if err := m.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if took := time.Since(begin); took < termGrace || took > termGrace+killGrace {
		t.Errorf("took %s", took)
	}
	if got := m.Exit(); got.Kind != vmm.ExitStopped {
		t.Errorf("%+v", got)
	}
}
