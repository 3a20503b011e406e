package firecracker

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/internal/hosttest/need"
	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/firecracker/fctest"
	"banger/internal/vmm/kvm"
)

// startFake starts a machine with one disk on the fake; it is stopped at the end.
func startFake(t *testing.T, dir string) *running {
	t.Helper()
	kernel := filepath.Join(dir, "vmlinux")
	for name, content := range map[string][]byte{"vmlinux": fctest.Kernel(), "work.img": make([]byte, 4096)} {
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d := New(Options{Binary: fctest.Fake(t), KVM: func() kvm.Result { return kvm.Result{Usable: true} }})
	r, err := d.Start(t.Context(), vmm.Machine{
		ID: "0a1b2c3d", Name: "web", Dir: dir, CPUs: 1, MemoryBytes: 128 << 20, Kernel: kernel,
		Disks: []vmm.Disk{{Role: "work", Path: "work.img"}},
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return r.(*running)
}

// A machine's process opens its own disk and no other machine's, whatever it is asked to do.
func TestOtherMachinesDisksAreOutOfReach(t *testing.T) {
	need.Kernel(t, "Landlock", system.Confines())
	own, other := t.TempDir(), t.TempDir()
	r := startFake(t, own)
	theirs := filepath.Join(other, "work.img")
	if err := os.WriteFile(theirs, make([]byte, 4096), 0o600); err != nil {
		t.Fatal(err)
	}
	drive := func(path string) error {
		return r.api.call(t.Context(), callTimeout, http.MethodPatch, "/drives/work", drivePatch{ID: "work", Path: path}, nil)
	}
	for _, path := range []string{"work.img", filepath.Join(own, "work.img"), drivePath("work")} {
		if err := drive(path); err != nil {
			t.Errorf("its own disk as %s: %v", path, err)
		}
	}
	link := filepath.Join(own, "link")
	if err := os.Symlink(theirs, link); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{theirs, link, "/etc/passwd"} {
		if err := drive(path); err == nil || !strings.Contains(err.Error(), "os error 13") {
			t.Errorf("it opened %s: %v", path, err)
		}
	}
	if _, err := os.ReadFile(theirs); err != nil {
		t.Errorf("the file is nobody's: %v", err)
	}
}
