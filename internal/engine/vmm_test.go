package engine

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/fake"
	"banger/internal/vmm/firecracker"
	"banger/internal/vmm/firecracker/fctest"
	"banger/internal/vmm/kvm"
	vmmmachine "banger/internal/vmm/machine"
)

// unplugged is Firecracker without network devices: the fake network makes none.
type unplugged struct{ *firecracker.Driver }

func (d unplugged) Start(ctx context.Context, m vmm.Machine) (vmm.Running, error) {
	m.NICs = nil
	return d.Driver.Start(ctx, m)
}

func (d unplugged) Check(ctx context.Context, m vmm.Machine) error {
	m.NICs = nil
	return d.Driver.Check(ctx, m)
}

func (d unplugged) CheckSaved(ctx context.Context, m vmm.Machine, dir string) error {
	m.NICs = nil
	return d.Driver.CheckSaved(ctx, m, dir)
}

func (d unplugged) Restore(ctx context.Context, m vmm.Machine, dir string) (vmm.Running, error) {
	m.NICs = nil
	return d.Driver.Restore(ctx, m, dir)
}

func newFirecracker(t *testing.T) unplugged {
	t.Helper()
	return unplugged{firecracker.New(firecracker.Options{
		Binary: fctest.Fake(t), KVM: func() kvm.Result { return kvm.Result{Usable: true} },
	})}
}

// A VM goes from one VMM to another and back, with its disks and its identity.
func TestAnotherVMM(t *testing.T) {
	h := newHouse(t)
	if err := os.WriteFile(h.files.k.ELF, fctest.Kernel(), 0o600); err != nil {
		t.Fatal(err)
	}
	h.close()
	h.more = []vmm.Driver{newFirecracker(t)}
	h.open()
	ctx := t.Context()
	for _, first := range []string{fake.Name, firecracker.Name} {
		spec := houseSpec("on-" + first)
		spec.VMM = first
		v, err := h.Create(ctx, spec, true, nil)
		if err != nil || v.Driver != first {
			t.Fatalf("create under %s: %+v, %v", first, v, err)
		}
		mark := filepath.Join(h.p.VM(v.ID), paths.OverlayDisk)
		written := markDisk(t, mark)
		second := fake.Name
		if first == second {
			second = firecracker.Name
		}
		if err := h.SetVMM(ctx, spec.Name, second); fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" {
			t.Errorf("another VMM for a VM that runs: %v", err)
		}
		for _, next := range []string{second, first} {
			if _, err := h.Stop(ctx, spec.Name, false, nil); err != nil {
				t.Fatal(err)
			}
			if err := h.SetVMM(ctx, spec.Name, next); err != nil {
				t.Fatal(err)
			}
			now, err := h.Start(ctx, spec.Name, nil)
			if err != nil {
				t.Fatalf("from %s to %s: %v", first, next, err)
			}
			if now.Driver != next || now.ID != v.ID || now.MAC != v.MAC || now.IP != v.IP || !sameNotes(v, now) {
				t.Errorf("under %s it is %+v, was %+v", next, now, v)
			}
			if text, err := os.ReadFile(mark); err != nil || string(text[:len(written)]) != written {
				t.Errorf("under %s its disk is another one: %v", next, err)
			}
			if h.bootID(spec.Name) == "" {
				t.Errorf("its agent does not answer under %s", next)
			}
		}
	}
	for _, bad := range []string{"", "vbox"} {
		if err := h.SetVMM(ctx, "on-"+fake.Name, bad); fault.KindOf(err) != fault.Usage {
			t.Errorf("VMM %q: %v", bad, err)
		}
	}
}

// A limit that a VMM cannot keep is refused before anything is touched, also when the VM was made under another one.
func TestLimitsOfAnotherVMM(t *testing.T) {
	h := newHouse(t)
	if err := os.WriteFile(h.files.k.ELF, fctest.Kernel(), 0o600); err != nil {
		t.Fatal(err)
	}
	h.close()
	h.more = []vmm.Driver{newFirecracker(t)}
	h.open()
	spec := houseSpec("web")
	spec.NetRate = 50 << 20
	if _, err := h.Create(t.Context(), spec, false, nil); fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Errorf("create: %v", err)
	}
	spec.VMM, spec.DiskRate = firecracker.Name, 100<<20
	v, err := h.Create(t.Context(), spec, true, nil)
	if err != nil {
		t.Fatal(err)
	}
	var facts struct {
		DiskRate int64 `json:"disk_rate"`
		NetRate  int64 `json:"net_rate"`
	}
	text, err := os.ReadFile(filepath.Join(h.p.VM(v.ID), vmmmachine.FactsFile))
	if err != nil || json.Unmarshal(text, &facts) != nil || facts.DiskRate != spec.DiskRate || facts.NetRate != spec.NetRate {
		t.Errorf("the machine was started with %s, %v", text, err)
	}
	if _, err := h.Stop(t.Context(), "web", false, nil); err != nil {
		t.Fatal(err)
	}
	if err := h.SetVMM(t.Context(), "web", fake.Name); err != nil {
		t.Fatal(err)
	}
	if _, err := h.Start(t.Context(), "web", nil); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "network rate") {
		t.Errorf("start under another VMM: %v", err)
	}
}

// What keeps a VM's memory works under Firecracker, too: suspend, snapshot, fork.
func TestMemoryUnderFirecracker(t *testing.T) {
	h := newHouse(t)
	if err := os.WriteFile(h.files.k.ELF, fctest.Kernel(), 0o600); err != nil {
		t.Fatal(err)
	}
	h.close()
	h.more = []vmm.Driver{newFirecracker(t)}
	h.open()
	ctx := t.Context()
	spec := houseSpec("web")
	spec.VMM = firecracker.Name
	if _, err := h.Create(ctx, spec, true, nil); err != nil {
		t.Fatal(err)
	}
	boot := h.bootID("web")
	if _, err := h.Suspend(ctx, "web", nil); err != nil {
		t.Fatal(err)
	}
	if err := h.SetVMM(ctx, "web", fake.Name); fault.KindOf(err) != fault.Conflict {
		t.Errorf("another VMM for a suspended VM: %v", err)
	}
	if v, err := h.Resume(ctx, "web", nil); err != nil || v.State != vm.Running {
		t.Fatalf("%+v, %v", v, err)
	}
	if again := h.bootID("web"); again != boot {
		t.Errorf("resumed with the boot id %s, not %s", again, boot)
	}
	if _, err := h.CreateSnapshot(ctx, "web", SnapshotOptions{Tag: "one"}, nil); err != nil {
		t.Fatalf("snapshot: %v", err)
	}
	if _, err := h.Fork(ctx, "web", ForkOptions{Count: 2}, nil); err != nil {
		t.Fatalf("fork: %v", err)
	}
	if _, err := h.Restart(ctx, "web", nil); err != nil {
		t.Fatal(err)
	}
	if other := h.bootID("web"); other == boot {
		t.Error("a restart kept the boot id")
	}
	if _, err := h.RestoreSnapshot(ctx, "web", "one", RestoreOptions{Running: true}, nil); err != nil {
		t.Fatalf("restore: %v", err)
	}
	if again := h.bootID("web"); again != boot {
		t.Errorf("restored with the boot id %s, not %s", again, boot)
	}
}

// markDisk writes what nobody but the guest would.
func markDisk(t *testing.T, path string) string {
	t.Helper()
	const text = "written in the guest"
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte(text), 0); err != nil {
		t.Fatal(err)
	}
	return text
}

// sameNotes compares what the capabilities remember: image, kernel, machine id, keys.
func sameNotes(a, b vm.VM) bool {
	x, err1 := json.Marshal(a.Notes)
	y, err2 := json.Marshal(b.Notes)
	return err1 == nil && err2 == nil && string(x) == string(y)
}

// The best VMM cannot be used: the next one is, once it is said why, and the VM says it always.
func TestFallback(t *testing.T) {
	h := newHouse(t)
	broken := firecracker.New(firecracker.Options{KVM: func() kvm.Result { return kvm.Result{Reason: "this is a test"} }, Binary: fctest.Fake(t)})
	h.Engine.c.Drivers = append([]vmm.Driver{broken}, h.Engine.c.Drivers...)
	var notices []string
	sink := progress.Sink(func(e progress.Event) {
		if e.Status == progress.Notice && strings.Contains(e.Message, "VMs run on") {
			notices = append(notices, e.Message)
		}
	})
	for _, name := range []string{"one", "two"} {
		v, err := h.Create(t.Context(), houseSpec(name), true, sink)
		if err != nil || v.Driver != fake.Name || v.SlowReason == "" {
			t.Errorf("%+v, %v", v, err)
		}
	}
	if len(notices) != 1 || !strings.Contains(notices[0], "fake") {
		t.Errorf("said: %q", notices)
	}
	spec := houseSpec("three")
	spec.VMM = firecracker.Name
	if _, err := h.Create(t.Context(), spec, true, sink); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "this is a test") {
		t.Errorf("the broken one by name: %v", err)
	}
}
