package firecracker_test

import (
	"os"
	"path/filepath"
	"testing"
	"time"

	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/firecracker"
	"banger/internal/vmm/firecracker/fakefc"
	"banger/internal/vmm/firecracker/fctest"
	"banger/internal/vmm/kvm"
	"banger/internal/vmm/vmmtest"
)

func TestMain(m *testing.M) { os.Exit(fctest.Main(m)) }

// onFake is a driver for the fake Firecracker at path.
func onFake(path string) func(testing.TB) vmm.Driver {
	return func(testing.TB) vmm.Driver {
		return firecracker.New(firecracker.Options{
			Binary: path, KVM: func() kvm.Result { return kvm.Result{Usable: true} },
		})
	}
}

// fakeMachine is one that the fake boots.
func fakeMachine(t testing.TB, dir string) vmm.Machine {
	t.Helper()
	kernel := filepath.Join(dir, "vmlinux")
	if err := os.WriteFile(kernel, fctest.Kernel(), 0o600); err != nil {
		t.Fatal(err)
	}
	return vmm.Machine{
		ID: vm.ID("0a1b2c3d"), Name: "web", Dir: dir, CPUs: 1, MemoryBytes: 128 << 20, Kernel: kernel,
	}
}

func TestConformance(t *testing.T) {
	for _, version := range []string{"1.16.1", "1.10.1"} {
		t.Run(version, func(t *testing.T) {
			vmmtest.Run(t, vmmtest.Target{
				New: onFake(fctest.Faulty(t, fakefc.Faults{Version: version})), Machine: fakeMachine, BootTimeout: 10 * time.Second,
				Hang:  []string{fakefc.ArgHangBoot},
				Panic: []string{fakefc.ArgPanic}, PanicText: "Kernel panic - not syncing",
				Break: func(m *vmm.Machine) { m.MemoryBytes = 1 << 60 },
			})
		})
	}
}
