package system

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"banger/internal/hosttest/need"
)

func TestWhereNothingIsDelegated(t *testing.T) {
	dir := t.TempDir()
	ours := filepath.Join(dir, "ours")
	if err := os.WriteFile(ours, []byte("0::/user.slice/app.slice/x.service\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	// No cgroup file system at all.
	if f, err := newCgroup(dir, ours, "x", CgroupLimits{PIDs: 5}); f != nil || err != nil {
		t.Errorf("made %v, %v", f, err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) != 1 {
		t.Errorf("something was made: %v", entries)
	}
}

// mountCgroups shows the host's tree of version 2, in which the test works below a group of its own.
func mountCgroups(t *testing.T) (root, group string) {
	t.Helper()
	need.Root(t)
	root = t.TempDir()
	if err := unix.Mount("cgroup2", root, "cgroup2", 0, ""); err != nil {
		need.Missing(t, "cgroup2", err.Error())
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	group = filepath.Join(root, "banger-test-"+filepath.Base(filepath.Dir(root)))
	if err := os.MkdirAll(filepath.Join(group, "app.slice", "ours"), 0o755); err != nil {
		need.Missing(t, "cgroup2", err.Error())
	}
	t.Cleanup(func() {
		for _, dir := range []string{"app.slice/vm", "app.slice/ours", "app.slice", ""} {
			RemoveCgroup(filepath.Join(group, dir))
		}
	})
	return root, group
}

func TestCgroupOfItsOwn(t *testing.T) {
	root, group := mountCgroups(t)
	ours := filepath.Join(t.TempDir(), "ours")
	path := strings.TrimPrefix(group, root) + "/app.slice/ours"
	if err := os.WriteFile(ours, []byte("1:cpu:/\n0::"+path+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if f, err := newCgroup(root, ours, "vm", CgroupLimits{}); f != nil || err != nil {
		t.Errorf("root made a group where nobody delegated: %v, %v", f, err)
	}
	if err := unix.Setxattr(group, "trusted.delegate", []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
	f, err := newCgroup(root, ours, "vm", CgroupLimits{MemoryHigh: 64 << 20, PIDs: 9, CPUWeight: 50})
	if err != nil || f == nil {
		t.Fatalf("no group: %v", err)
	}
	defer f.Close()
	p, err := Start(StartOptions{Path: "/bin/sleep", Args: []string{"100"}, Cgroup: f})
	if err != nil {
		t.Fatal(err)
	}
	if text, _ := os.ReadFile(filepath.Join(f.Name(), "pids.max")); len(text) > 0 && string(text) != "9\n" {
		t.Errorf("pids.max is %q", text)
	}
	if got := CgroupOf(p.PID(), "vm"); !strings.HasSuffix(got, "/app.slice/vm") {
		t.Errorf("it is in %q", got)
	}
	if got := CgroupOf(p.PID(), "other"); got != "" {
		t.Errorf("it is in %q", got)
	}
	_ = p.Signal(unix.SIGKILL)
	<-p.Done()
	RemoveCgroup(f.Name())
	if _, err := os.Stat(f.Name()); !os.IsNotExist(err) {
		t.Errorf("the group is left: %v", err)
	}
}
