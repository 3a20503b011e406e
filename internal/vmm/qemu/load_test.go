package qemu

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// bare is a machine without a kernel, as it is restored.
func bare(t *testing.T, d *Driver) (vmm.Machine, vmm.Caps) {
	t.Helper()
	need.Binary(t, "qemu-system-x86_64")
	caps, err := d.Caps(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return vmm.Machine{ID: "0a1b2c3d", Name: "web", Dir: t.TempDir(), CPUs: 1, MemoryBytes: 64 << 20}, caps
}

// saved writes a manifest that fits m, for a state of that text.
func saved(t *testing.T, d *Driver, m vmm.Machine, caps vmm.Caps, state string) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, vmm.SavedState), []byte(state), 0o600); err != nil {
		t.Fatal(err)
	}
	places, err := layout(d.platform, caps.Accelerator, m)
	if err != nil {
		t.Fatal(err)
	}
	err = machine.WriteSaved(t.Context(), dir, machine.Saved{
		VMM: Name, Build: caps.Build, Accelerator: caps.Accelerator, CPUModel: machine.HostCPU(caps.Accelerator),
		Layout: places, CPUs: m.CPUs, MemoryBytes: m.MemoryBytes,
	}, false)
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestStateThatDoesNotLoad: what passes every check and is no state all the same.
func TestStateThatDoesNotLoad(t *testing.T) {
	d := New(Options{})
	m, caps := bare(t, d)
	for _, state := range []string{"", "nonsense", "QEVM\x00\x00\x00\x03\x07"} {
		dir := saved(t, d, m, caps, state)
		r, err := d.Restore(t.Context(), m, dir)
		if err == nil {
			_ = r.Stop(context.Background())
		}
		if fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
			t.Errorf("%q: %v (hint %q)", state, err, fault.HintOf(err))
		}
		t.Logf("%q: %v", state, err)
	}
	if _, err := machine.Find(m.Dir, vmm.Handle{}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a process is left: %v", err)
	}
}

// TestRestoreCutOff: a daemon that dies while it restores leaves a QEMU that waits for ever. Nothing ran in it.
func TestRestoreCutOff(t *testing.T) {
	d := New(Options{})
	m, caps := bare(t, d)
	args, err := restoreArguments(d.platform, caps.Accelerator, m, memory{})
	if err != nil {
		t.Fatal(err)
	}
	r, err := d.bringUp(t.Context(), m, caps.Accelerator, args, nil, func(context.Context, *monitor) error { return nil })
	if err != nil {
		t.Fatal(err)
	}
	h := r.Handle()
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if r, err := New(Options{}).Adopt(t.Context(), m, h); fault.KindOf(err) != fault.NotFound {
		if err == nil {
			_ = r.Stop(context.Background())
		}
		t.Errorf("adopted: %v", err)
	}
	if _, err := machine.Find(m.Dir, h); fault.KindOf(err) != fault.NotFound {
		t.Errorf("the process is left: %v", err)
	}
	if _, err := os.Stat(filepath.Join(m.Dir, MonitorSocket)); !os.IsNotExist(err) {
		t.Errorf("its socket is left: %v", err)
	}
}

// TestLayoutOfAnEarlierBuild: what was saved on the processor that emulated guests had before fits, and nothing else does.
func TestLayoutOfAnEarlierBuild(t *testing.T) {
	p := platforms["amd64"]
	before, first := p, p
	before.softwareCPU, first.softwareCPU = p.softwareCPUsBefore[0], p.softwareCPUsBefore[1]
	m := sample()
	more := sample()
	more.CPUs++
	for _, c := range []struct {
		p           platform
		accelerator string
		m           vmm.Machine
		fits        bool
	}{
		{p, "tcg", m, true},
		{before, "tcg", m, true},
		{first, "tcg", m, true},
		{before, "tcg", more, false},
		{before, "kvm", m, false},
	} {
		saved, err := layout(c.p, c.accelerator, c.m)
		if err != nil {
			t.Fatal(err)
		}
		if now, err := fittingLayout(p, "tcg", m, saved); err != nil || (now == saved) != c.fits {
			t.Errorf("%v: %s, not %s, %v", c, now, saved, err)
		}
	}
}

// TestLayout: what may differ between a machine and those restored from it is no part of the layout, and the
// rest is.
func TestLayout(t *testing.T) {
	p := platforms["amd64"]
	hash := func(change func(*vmm.Machine)) string {
		m := sample()
		change(&m)
		text, err := layout(p, "tcg", m)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	want := hash(func(*vmm.Machine) {})
	for name, change := range map[string]func(*vmm.Machine){
		"name":    func(m *vmm.Machine) { m.Name, m.ID, m.Dir = "x", "y", "/z" },
		"network": func(m *vmm.Machine) { m.NICs[0] = vmm.NIC{TAP: "x", MAC: "y"} },
		"path":    func(m *vmm.Machine) { m.Disks[1].Path = "/x" },
		"kernel":  func(m *vmm.Machine) { m.Kernel, m.Initramfs, m.Cmdline = "x", "y", nil },
		"memory":  func(m *vmm.Machine) { m.MemoryFile = "x" },
	} {
		if hash(change) != want {
			t.Errorf("%s is part of the layout", name)
		}
	}
	for name, change := range map[string]func(*vmm.Machine){
		"no network": func(m *vmm.Machine) { m.NICs = nil },
		"order":      func(m *vmm.Machine) { m.Disks[0], m.Disks[1] = m.Disks[1], m.Disks[0] },
		"writable":   func(m *vmm.Machine) { m.Disks[0].ReadOnly = false },
		"CPUs":       func(m *vmm.Machine) { m.CPUs++ },
	} {
		if hash(change) == want {
			t.Errorf("%s is no part of the layout", name)
		}
	}
}
