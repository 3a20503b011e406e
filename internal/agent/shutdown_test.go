package agent

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
)

// standStill is set for the child of TestOurInitBecomesTheImages, which waits for the end of its stdin.
const standStill = "BANGER_TEST_STAND_STILL"

// Our init lies in a root that is gone, like this child's program: it can be opened, but has no name any more.
func TestOurInitBecomesTheImages(t *testing.T) {
	if os.Getenv(standStill) != "" {
		_, _ = io.Copy(io.Discard, os.Stdin)
		return
	}
	self, err := os.Executable()
	check(t, err)
	dir, err := os.MkdirTemp(filepath.Dir(self), "init-*") // on the same file system, for the link
	check(t, err)
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	program := filepath.Join(dir, "init")
	check(t, os.Link(self, program))
	wait, end, err := os.Pipe()
	check(t, err)
	defer wait.Close()
	child, err := os.StartProcess(program, []string{"/init", "-test.run=^TestOurInitBecomesTheImages$"}, &os.ProcAttr{
		Env: append(os.Environ(), standStill+"=1"), Files: []*os.File{wait, nil, nil},
	})
	check(t, err)
	t.Cleanup(func() {
		end.Close()
		_, err := child.Wait()
		check(t, err)
	})
	check(t, os.Remove(program))
	systemdAt := filepath.Join(dir, "systemd")
	check(t, os.WriteFile(systemdAt, nil, 0o755))
	init := filepath.Join(dir, "sbin-init")
	check(t, os.Symlink("systemd", init))
	for next, want := range map[string]initKind{init: systemd, self: otherInit, "": otherInit} {
		if got := kindOf(fmt.Sprintf("/proc/%d", child.Pid), func() string { return next }); got != want {
			t.Errorf("our init before %q counts as %v, want %v", next, got, want)
		}
	}
}

// Another's first process is what its program is, whatever its name.
func TestKindOfFirstProcess(t *testing.T) {
	for _, c := range []struct {
		cmdline, comm, program string
		want                   initKind
	}{
		{"/sbin/init\x00", "systemd\n", "/usr/bin/anything", systemd},
		{"/sbin/init\x00", "init\n", "systemd", systemd},
		{"/sbin/init\x00", "init\n", "busybox", otherInit},
		{"/run/banger/agent\x00supervise\x00banger.agent.0\x00", "agent\n", "agent", supervisor},
	} {
		dir := t.TempDir()
		for name, text := range map[string]string{"cmdline": c.cmdline, "comm": c.comm} {
			check(t, os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600))
		}
		program := filepath.Join(dir, filepath.Base(c.program))
		check(t, os.WriteFile(program, nil, 0o700))
		check(t, os.Symlink(program, filepath.Join(dir, "exe")))
		got := kindOf(dir, func() string { t.Error("asked for what it becomes"); return "" })
		if got != c.want {
			t.Errorf("%q, %q, %s: %v, want %v", c.cmdline, c.comm, c.program, got, c.want)
		}
	}
	if got := kindOf(t.TempDir(), func() string { return "" }); got != otherInit {
		t.Errorf("nobody counts as %v", got)
	}
}
