package firecracker_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"banger/internal/hosttest/need"
	"banger/internal/kernel"
	"banger/internal/paths"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/firecracker"
	"banger/internal/vmm/firecracker/fctest"
	"banger/internal/vmm/kvm"
	"banger/internal/vmm/vmmtest"
)

// TestRealConformance is the whole suite on a real Firecracker, with banger's own kernel and agent.
func TestRealConformance(t *testing.T) {
	path := fctest.Real(t)
	if r := kvm.Probed(); !r.Usable {
		need.Missing(t, "kvm", r.Reason)
	}
	m := realMachine(t)
	vmmtest.Run(t, vmmtest.Target{
		New: func(testing.TB) vmm.Driver { return firecracker.New(firecracker.Options{Binary: path}) },
		Machine: func(_ testing.TB, dir string) vmm.Machine {
			m := m
			m.Dir = dir
			return m
		},
		BootTimeout: 90 * time.Second,
		// Nothing to add for a hang: the first milliseconds of a boot are hang enough.
		Panic: []string{"rdinit=/nonexistent", "init=/nonexistent"}, PanicText: "Kernel panic - not syncing",
		Break: func(m *vmm.Machine) { m.MemoryBytes = 1 << 60 },
	})
}

// realMachine has no disks: its root is its initramfs.
func realMachine(t *testing.T) vmm.Machine {
	t.Helper()
	store := kernel.Open(paths.Paths{State: need.VM(t)}.Kernels(), t.TempDir())
	k, err := store.Get(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	init := filepath.Join(t.TempDir(), "init") // the suite's own takes its place
	if err := os.WriteFile(init, []byte("none"), 0o600); err != nil {
		t.Fatal(err)
	}
	base, modules, err := store.Initramfs(t.Context(), k, init, "vmw_vsock_virtio_transport")
	if err != nil {
		t.Fatal(err)
	}
	return vmm.Machine{
		ID: vm.ID("0a1b2c3d"), Name: "web", CPUs: 2, MemoryBytes: 256 << 20, Kernel: k.ELF, Cmdline: []string{"quiet"},
		Initramfs: vmmtest.Initramfs(t, vmmtest.Guest{Channel: vsockChannel, Base: base, Modules: modules}),
	}
}

// vsockChannel is how the agent is told to listen on a vsock port.
const vsockChannel = "vsock:1024"
