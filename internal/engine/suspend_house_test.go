package engine

import (
	"context"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/hosttest/need"
	"banger/internal/paths"
	"banger/internal/vm"
)

// bootID asks the guest.
func (h *house) bootID(name string) string {
	h.t.Helper()
	agent, err := h.Agent(h.t.Context(), name)
	if err != nil {
		h.t.Fatal(err)
	}
	pong, err := agent.Ping(h.t.Context(), &agentv1.PingRequest{})
	if err != nil {
		h.t.Fatal(err)
	}
	return pong.GetBootId()
}

// A real process is saved, ended, and started from its memory by the daemon after the next.
func TestSuspendOverDaemons(t *testing.T) {
	h := newHouse(t)
	v := h.create("web")
	boot := h.bootID("web")
	h.close()
	h.open()
	if _, err := h.Reconcile(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Suspend(t.Context(), "web", nil); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(pid(t, v), 0); err == nil {
		t.Error("the process outlived the suspend")
	}
	if s := h.net.String(); strings.Contains(s, "tap") || strings.Contains(s, "nat") {
		t.Errorf("left %s", s)
	}
	h.close()
	h.open()
	if told, err := h.Reconcile(t.Context()); err != nil || len(told) > 0 {
		t.Errorf("mended %q, %v", told, err)
	}
	got, err := h.Resume(t.Context(), "web", nil)
	if err != nil || got.State != vm.Running || got.IP != v.IP {
		t.Fatalf("%+v, %v", got, err)
	}
	if again := h.bootID("web"); again != boot {
		t.Errorf("the guest is of boot %s, was of %s", again, boot)
	}
}

// The disk fills up while the memory is written: the VM runs on, and nothing of it is left there.
func TestDiskThatFillsUpInTheMiddle(t *testing.T) {
	h := newHouse(t)
	h.smallDisk(h.p.VMs(), "260m")
	s := houseSpec("large")
	s.MemoryBytes = 512 << 20
	if _, err := h.Create(t.Context(), s, true, nil); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Suspend(t.Context(), "large", nil); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "disk full") {
		t.Errorf("too little room: %v", err)
	}
	if err := h.Delete(t.Context(), "large", true, nil); err != nil {
		t.Fatal(err)
	}
	s = houseSpec("web")
	s.MemoryBytes = 128 << 20
	v, err := h.Create(t.Context(), s, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	filler := filepath.Join(h.p.VMs(), "filler")
	h.after(func(_, stage string) {
		if stage == stagePause {
			fill(t, filler)
		}
	})
	boot := h.bootID("web")
	files := listing(t, h.p.VM(v.ID))
	_, err = h.Suspend(t.Context(), "web", nil)
	h.after(nil)
	if fault.KindOf(err) != fault.Precondition {
		t.Errorf("a full disk: %v", err)
	}
	if got, _ := h.Get(t.Context(), "web"); got.State != vm.Running || h.bootID("web") != boot {
		t.Errorf("VM is %s (%s)", got.State, got.Reason)
	}
	if now := listing(t, h.p.VM(v.ID)); now != files {
		t.Errorf("files are\n%s\nwere\n%s", now, files)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Suspend(t.Context(), "web", nil); err != nil {
		t.Errorf("with room: %v", err)
	}
	if _, err := h.Resume(t.Context(), "web", nil); err != nil || h.bootID("web") != boot {
		t.Errorf("resume: %v", err)
	}
}

// smallDisk mounts a disk of its own on a directory of the house.
func (h *house) smallDisk(dir, size string) {
	h.t.Helper()
	need.Root(h.t)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		h.t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size="+size); err != nil {
		h.t.Fatal(err)
	}
	h.t.Cleanup(func() {
		rows, _ := h.List(context.Background())
		for _, v := range rows {
			_ = h.Delete(context.Background(), string(v.ID), true, nil)
		}
		if err := unix.Unmount(dir, 0); err != nil {
			h.t.Error(err)
		}
	})
}

// The disk fills up before each stage that writes: the VM runs on or is as it was, and nothing half made is left.
func TestDiskThatFillsUpUnderACopy(t *testing.T) {
	h := newHouse(t)
	h.smallDisk(h.p.VMs(), "400m")
	s := houseSpec("web")
	s.MemoryBytes = 128 << 20
	v, err := h.Create(t.Context(), s, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	boot := h.bootID("web")
	if _, err := h.CreateSnapshot(t.Context(), "web", SnapshotOptions{Tag: "old"}, nil); err != nil {
		t.Fatal(err)
	}
	work := filepath.Join(h.p.VM(v.ID), paths.WorkDisk)
	filler := filepath.Join(h.p.VMs(), "filler")
	verbs := []struct {
		name   string
		verb   func() error
		stages []string
	}{
		{"snapshot", func() error {
			_, err := h.CreateSnapshot(t.Context(), "web", SnapshotOptions{Tag: "v1"}, nil)
			return err
		}, []string{stageQuiesce, stagePause, stageSave}},
		{"fork", func() error {
			_, err := h.Fork(t.Context(), "web", ForkOptions{Name: "kid"}, nil)
			return err
		}, []string{stageQuiesce, stagePause, stageSeal}},
		{"restore", func() error {
			_, err := h.RestoreSnapshot(t.Context(), "web", "old", RestoreOptions{Running: true}, nil)
			return err
		}, []string{stageCheck}},
	}
	for _, v := range verbs {
		for _, at := range v.stages {
			h.after(func(operation, stage string) {
				if operation == v.name && stage == at {
					fill(t, filler)
				}
			})
			before := tree(t, h.p.VMs())
			err := v.verb()
			h.after(nil)
			if err := os.Remove(filler); err != nil {
				t.Fatalf("%s %s: %v", v.name, at, err)
			}
			if fault.KindOf(err) != fault.Precondition {
				t.Errorf("%s on a disk that is full after %s: %v", v.name, at, err)
			}
			if got, _ := h.Get(t.Context(), "web"); got.State != vm.Running || h.bootID("web") != boot {
				t.Errorf("%s %s: VM is %s (%s)", v.name, at, got.State, got.Reason)
			}
			if now := tree(t, h.p.VMs()); now != before {
				t.Errorf("%s %s: files are\n%s\nwere\n%s", v.name, at, now, before)
			}
		}
		if err := v.verb(); err != nil {
			t.Errorf("%s with room: %v", v.name, err)
		}
	}
	if info, err := os.Stat(work); err != nil || info.Size() != houseSeed {
		t.Errorf("work disk %v, %v", info, err)
	}
}

// The disk of the templates fills up while one is made.
func TestDiskThatFillsUpUnderATemplate(t *testing.T) {
	s := houseSpec("any")
	s.MemoryBytes = 128 << 20
	for _, at := range []string{"root-disk", stageAgent, stagePause} {
		h := newTemplateHouse(t)
		h.smallDisk(h.p.Templates(), "400m")
		filler := filepath.Join(h.p.Templates(), "filler")
		h.after(func(operation, stage string) {
			if operation == "template" && stage == at {
				fill(t, filler)
			}
		})
		_, err := h.WarmTemplate(t.Context(), s, nil)
		h.after(nil)
		if err := os.Remove(filler); err != nil {
			t.Fatalf("%s: %v", at, err)
		}
		if fault.KindOf(err) != fault.Precondition {
			t.Errorf("a disk that is full after %s: %v", at, err)
		}
		h.nothingButTemplates(t, 0)
		if _, err := h.WarmTemplate(t.Context(), s, nil); err != nil {
			t.Errorf("with room: %v", err)
		}
	}
}

// tree lists all files and directories below dir.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var all []string
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		all = append(all, path)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return strings.Join(all, "\n")
}

// fill makes a file of all the space that a small disk has left.
func fill(t *testing.T, name string) {
	f, err := os.Create(name)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	var st unix.Statfs_t
	err = unix.Fstatfs(int(f.Fd()), &st)
	if err == nil {
		err = unix.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize)
	}
	if err != nil {
		t.Errorf("fill the disk: %v", err)
	}
	if n, err := f.WriteAt([]byte("more"), int64(st.Bavail)*st.Bsize); err == nil {
		t.Errorf("%d bytes more have room", n)
	}
}

func listing(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return strings.Join(names, "\n")
}
