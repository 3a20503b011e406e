package engine

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/hosttest/need"
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
	need.Root(t)
	h := newHouse(t)
	if err := unix.Mount("tmpfs", h.p.VMs(), "tmpfs", 0, "size=260m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = h.Delete(context.Background(), "web", true, nil)
		_ = h.Delete(context.Background(), "large", true, nil)
		if err := unix.Unmount(h.p.VMs(), 0); err != nil {
			t.Error(err)
		}
	})
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
	h.hook = func(_, stage string) {
		if stage == stagePause {
			fill(t, filler)
		}
	}
	boot := h.bootID("web")
	files := listing(t, h.p.VM(v.ID))
	_, err = h.Suspend(t.Context(), "web", nil)
	h.hook = nil
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

// fill writes until nothing fits any more.
func fill(t *testing.T, name string) {
	f, err := os.Create(name)
	if err != nil {
		t.Error(err)
		return
	}
	defer f.Close()
	for _, size := range []int{1 << 20, 1} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
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
