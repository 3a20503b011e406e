package cgroup

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"
)

// processes makes what a kernel shows of processes: the first one is in a group, the others have a program or are threads
// of the kernel's.
func processes(t *testing.T, first string, programs map[int]string) string {
	t.Helper()
	proc := t.TempDir()
	check := func(err error) {
		if err != nil {
			t.Fatal(err)
		}
	}
	for pid, program := range programs {
		dir := filepath.Join(proc, strconv.Itoa(pid))
		check(os.Mkdir(dir, 0o755))
		if program == "" {
			continue
		}
		check(os.Symlink("/bin/"+program, filepath.Join(dir, "exe")))
	}
	check(os.WriteFile(filepath.Join(proc, "1/cgroup"), []byte("0::"+first+"\n"), 0o644))
	check(os.Mkdir(filepath.Join(proc, "self"), 0o755))
	check(os.Symlink("/bin/cat", filepath.Join(proc, "self/exe")))
	return proc
}

func TestOnlyProgramsAreStopped(t *testing.T) {
	proc := processes(t, "/", map[int]string{1: "sh", 2: "", 7: "cat", 8: "cat", 9: "cat"})
	for pid, line := range map[int]string{7: "agent\x00serve\x00port\x00", 8: "agent\x00sftp\x00", 9: "agent\x00guard\x00"} {
		if err := os.WriteFile(filepath.Join(proc, strconv.Itoa(pid), "cmdline"), []byte(line), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for pid, want := range map[int]bool{1: false, 2: true, 7: true, 8: false, 9: true, 10: true} {
		if got := stays(proc, pid); got != want {
			t.Errorf("process %d stays: %v", pid, got)
		}
	}
}

// Who has groups of its own is not moved.
func TestWhoHasAGroupIsNotMoved(t *testing.T) {
	for _, c := range []struct{ first, own, gatheredBelow string }{
		{"/init.scope", "/system.slice/banger-agent.service", ""},
		{"/init.scope", "/", ""},
		{"/", "/", "/"},
		{"/", "/openrc.agent", "/"},
		{"/a", "/ab", ""},
		{"/a", "/a/b", "/a"},
	} {
		root := t.TempDir()
		if err := errors.Join(os.MkdirAll(filepath.Join(root, c.first), 0o755), os.WriteFile(filepath.Join(root, c.first, "cgroup.procs"), nil, 0o644)); err != nil {
			t.Fatal(err)
		}
		h := &hierarchy{root: root}
		err := h.gather(t.Context(), c.own, processes(t, c.first, map[int]string{1: "sh"}), func(string) error { return nil })
		if err != nil {
			t.Errorf("%+v: %v", c, err)
		}
		want := ""
		if c.gatheredBelow != "" {
			want = filepath.Join(root, c.gatheredBelow)
		}
		if h.from != want {
			t.Errorf("%+v: gathered below %q", c, h.from)
		}
		if err := h.disband(); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(filepath.Join(root, c.first, gathered)); err == nil {
			t.Errorf("%+v: the group is left", c)
		}
	}
}

func TestGroupIsNotRemovedWhileSomebodyIsAboutToEnter(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "programs")
	f, err := keep(dir)
	if err != nil {
		t.Fatal(err)
	}
	removeUnlessKept(dir)
	if _, err := os.Stat(dir); err != nil {
		t.Errorf("while it is open: %v", err)
	}
	f.Close()
	removeUnlessKept(dir)
	if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("afterwards: %v", err)
	}
}

func TestGroupThatWasRemovedIsNotEntered(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "programs")
	f, err := keep(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, another := range []bool{false, true} {
		if err := os.RemoveAll(dir); err != nil {
			t.Fatal(err)
		}
		if another {
			if err := os.Mkdir(dir, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if there, err := lockShared(f); there || err != nil {
			t.Errorf("another of its name: %v: got %v, %v", another, there, err)
		}
	}
}

// The guard goes where the agent is: with the others it would stand still.
func TestGuardIsTakenAlong(t *testing.T) {
	h := &hierarchy{root: t.TempDir()}
	procs := filepath.Join(h.root, "agent", "cgroup.procs")
	if err := errors.Join(os.Mkdir(filepath.Dir(procs), 0o755), os.WriteFile(procs, nil, 0o644)); err != nil {
		t.Fatal(err)
	}
	const nobody = 1 << 30 // more than the kernel gives
	for _, c := range []struct {
		guard int
		own   string
		want  string
	}{
		{0, "/agent", ""},
		{nobody, "/agent", ""},
		{os.Getpid(), "", ""},
		{os.Getpid(), "/gone", ""}, // somebody has just taken the agent to another one
		{os.Getpid(), "/agent", strconv.Itoa(os.Getpid())},
	} {
		if err := h.take(c.guard, c.own); err != nil {
			t.Errorf("%+v: %v", c, err)
		}
		if got, err := os.ReadFile(procs); err != nil || string(got) != c.want {
			t.Errorf("%+v: %q were taken, %v", c, got, err)
		}
	}
	own, err := Own()
	if err != nil {
		t.Fatal(err)
	}
	for guard, want := range map[int]bool{0: true, os.Getpid(): true, nobody: true} {
		if still, err := stillBeside(own, guard, false); still != want || err != nil {
			t.Errorf("guard %d: %v, %v", guard, still, err)
		}
	}
	if still, err := stillBeside(own+"x", 0, false); still || err != nil {
		t.Errorf("in another group: %v, %v", still, err)
	}
}

func TestNobodyIsMovedWhileGroupsAreStopped(t *testing.T) {
	root := t.TempDir()
	first, err := lockMoves(t.Context(), root)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := lockMoves(ctx, root); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("at the same time: %v", err)
	}
	first.Close()
	second, err := lockMoves(t.Context(), root)
	if err != nil {
		t.Fatalf("afterwards: %v", err)
	}
	second.Close()
}
