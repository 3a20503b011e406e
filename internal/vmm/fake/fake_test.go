package fake_test

import (
	"os"
	"testing"
	"time"

	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/fake"
	"banger/internal/vmm/vmmtest"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == fake.Argument {
		os.Exit(fake.Main(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func newDriver(t testing.TB) vmm.Driver {
	t.Helper()
	d, err := fake.New()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func newMachine(_ testing.TB, dir string) vmm.Machine {
	return vmm.Machine{ID: vm.ID("0a1b2c3d"), Name: "web", Dir: dir, CPUs: 1, MemoryBytes: 512 << 20}
}

func TestConformance(t *testing.T) {
	vmmtest.Run(t, vmmtest.Target{
		New: newDriver, Machine: newMachine, BootTimeout: 10 * time.Second,
		Hang:  []string{fake.ArgHangBoot},
		Panic: []string{fake.ArgPanic}, PanicText: "Kernel panic - not syncing",
		Break: func(m *vmm.Machine) { m.Cmdline = append(m.Cmdline, fake.ArgRefuse) },
	})
}
