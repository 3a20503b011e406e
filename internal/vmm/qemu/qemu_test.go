package qemu_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
	"banger/internal/kernel"
	"banger/internal/paths"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/qemu"
	"banger/internal/vmm/vmmtest"
)

// kernelVariable names a guest kernel, ELF or bzImage, instead of the one that banger's setup made.
const kernelVariable = "BANGER_TEST_KERNEL"

func testKernel(t testing.TB) string {
	t.Helper()
	if path := os.Getenv(kernelVariable); path != "" {
		need.Binary(t, "qemu-system-x86_64")
		return path
	}
	state := paths.Paths{State: need.VM(t)}
	k, err := kernel.Open(state.Kernels(), t.TempDir()).Get(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return k.ELF
}

// testInitramfs holds an init, the agent, the programs that the suite calls, and one called tool if its source
// is given.
func testInitramfs(t testing.TB, tool ...string) string {
	t.Helper()
	return vmmtest.Initramfs(t, vmmtest.Guest{Channel: vmm.ChannelPort, Tool: strings.Join(tool, "")})
}

func TestConformance(t *testing.T) {
	kernel, initramfs := testKernel(t), testInitramfs(t)
	vmmtest.Run(t, vmmtest.Target{
		New: func(testing.TB) vmm.Driver { return qemu.New(qemu.Options{}) },
		Machine: func(_ testing.TB, dir string) vmm.Machine {
			return vmm.Machine{
				ID: vm.ID("0a1b2c3d"), Name: "web", Dir: dir, CPUs: 2, MemoryBytes: 256 << 20,
				Kernel: kernel, Initramfs: initramfs, Cmdline: []string{"quiet"},
			}
		},
		BootTimeout: 90 * time.Second,
		// Nothing to add: the first seconds of a boot are hang enough.
		Panic: []string{"rdinit=/nonexistent", "init=/nonexistent"}, PanicText: "Kernel panic - not syncing",
		Break: func(m *vmm.Machine) { m.MemoryBytes = 1 << 60 },
	})
}

// TestDisks: many machines share a read-only disk; a writable one has one machine.
func TestDisks(t *testing.T) {
	kernel := testKernel(t)
	shared, own := filepath.Join(t.TempDir(), "root, with a comma.ext4"), filepath.Join(t.TempDir(), "work.ext4")
	for _, path := range []string{shared, own} {
		if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d := qemu.New(qemu.Options{})
	machine := func(disks ...vmm.Disk) vmm.Machine {
		return vmm.Machine{
			ID: "0a1b2c3d", Name: "web", Dir: t.TempDir(), CPUs: 1, MemoryBytes: 128 << 20, Kernel: kernel, Disks: disks,
		}
	}
	root := vmm.Disk{Role: "root", Path: shared, ReadOnly: true}
	work := vmm.Disk{Role: "work", Path: own}
	for _, m := range []vmm.Machine{machine(root, work), machine(root)} {
		r, err := d.Start(t.Context(), m)
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := r.Stop(context.Background()); err != nil {
				t.Error(err)
			}
		}()
	}
	r, err := d.Start(t.Context(), machine(root, work))
	if err == nil {
		_ = r.Stop(context.Background())
	}
	if fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" {
		t.Errorf("a second writer: %v (hint %q)", err, fault.HintOf(err))
	}
}

func TestCheckFindsMissingDevices(t *testing.T) {
	kernel := testKernel(t)
	m := vmm.Machine{
		ID: "0a1b2c3d", Name: "web", Dir: t.TempDir(), CPUs: 1, MemoryBytes: 128 << 20, Kernel: kernel,
		NICs: []vmm.NIC{{TAP: "bgr-nowhere", MAC: "52:54:00:00:00:01"}},
	}
	if err := qemu.New(qemu.Options{}).Check(t.Context(), m); fault.KindOf(err) != fault.Precondition {
		t.Errorf("a missing TAP device: %v", err)
	}
}

func TestWithoutQEMU(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	_, err := qemu.New(qemu.Options{}).Caps(t.Context())
	if fault.KindOf(err) != fault.Precondition || !strings.HasPrefix(fault.HintOf(err), "apt install qemu-system-") {
		t.Errorf("%v (hint %q)", err, fault.HintOf(err))
	}
	_, err = qemu.New(qemu.Options{Binary: "/bin/false"}).Caps(t.Context())
	if fault.KindOf(err) != fault.Precondition {
		t.Errorf("a QEMU that does not run: %v", err)
	}
}

func TestCaps(t *testing.T) {
	need.Binary(t, "qemu-system-x86_64")
	caps, err := qemu.New(qemu.Options{}).Caps(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%+v", caps)
	if caps.Version == "" || (caps.Accelerator == "kvm") != (caps.SlowReason == "") {
		t.Errorf("%+v", caps)
	}
}

// All threads of a machine's QEMU are behind the filter of system calls.
func TestSandbox(t *testing.T) {
	d := qemu.New(qemu.Options{})
	r, err := d.Start(t.Context(), vmm.Machine{
		ID: "0a1b2c3d", Name: "web", Dir: t.TempDir(), CPUs: 2, MemoryBytes: 128 << 20, Kernel: testKernel(t),
	})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := r.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	}()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", r.Handle().PID))
	if err != nil || len(threads) < 3 {
		t.Fatalf("%d threads, %v", len(threads), err)
	}
	for _, name := range threads {
		status, err := os.ReadFile(name)
		if err == nil && !strings.Contains(string(status), "\nSeccomp:\t2\n") { // a helper thread may have ended
			t.Errorf("%s is not confined:\n%s", name, status)
		}
	}
}
