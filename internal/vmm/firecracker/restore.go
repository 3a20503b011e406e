package firecracker

import (
	"context"
	"path/filepath"

	"banger/internal/fault"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// CheckSaved compares what was saved with this Firecracker, this host and m.
func (d *Driver) CheckSaved(ctx context.Context, m vmm.Machine, dir string) error {
	_, err := d.checkSaved(ctx, m, dir)
	return err
}

func (d *Driver) checkSaved(ctx context.Context, m vmm.Machine, dir string) (machine.Saved, error) {
	f, err := d.find(ctx)
	if err != nil {
		return machine.Saved{}, err
	}
	if f.version.deafAfterRestore() {
		return machine.Saved{}, fault.New(fault.Precondition, "%s", f.version.warning())
	}
	if err := checkMachine(f.version, m); err != nil {
		return machine.Saved{}, err
	}
	saved, err := machine.ReadSaved(dir)
	if err != nil {
		return saved, err
	}
	now := machine.Saved{
		VMM: Name, Build: f.caps.Build, Accelerator: accelerator, CPUModel: machine.HostCPU(accelerator),
		Layout: layout(f.version, m),
	}
	if err := saved.Check(ctx, now, m, dir); err != nil {
		return saved, err
	}
	if saved.Memory == nil {
		return saved, fault.New(fault.Precondition, "there is no memory in %s", dir)
	}
	return saved, nil
}

// Restore starts Firecracker and has it load the state and let the guest run.
func (d *Driver) Restore(ctx context.Context, m vmm.Machine, dir string) (vmm.Running, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	saved, err := d.checkSaved(ctx, m, dir)
	if err != nil {
		return nil, err
	}
	if dir, err = filepath.Abs(dir); err != nil {
		return nil, err
	}
	// They are in the memory.
	m.Kernel, m.Initramfs, m.MemoryFile = "", "", ""
	if err := machine.CheckHost(m); err != nil {
		return nil, err
	}
	return d.bringUp(ctx, m, dir, func(ctx context.Context, c *client, v version) error {
		return load(ctx, c, v, m, saved, d.seen(m, dir).saved)
	})
}

// load reads the state in dir, as Firecracker sees it, maps the memory, and lets the guest run. Its drives are those that the links of this machine's
// directory lead to.
func load(ctx context.Context, c *client, v version, m vmm.Machine, saved machine.Saved, dir string) error {
	l := snapshotLoad{
		State:  filepath.Join(dir, vmm.SavedState),
		Memory: memoryBackend{Type: "File", Path: filepath.Join(dir, vmm.SavedMemory)},
		Resume: true,
	}
	if v.networkOverrides() {
		for i, n := range m.NICs {
			l.Overrides = append(l.Overrides, networkOverride{ID: interfaceID(i), TAP: n.TAP})
		}
	}
	if err := c.load(ctx, l); err != nil {
		return err
	}
	return adjust(ctx, c, m, saved)
}

// adjust makes of a machine that goes on what it is now: its limits are those that were saved.
func adjust(ctx context.Context, c *client, m vmm.Machine, saved machine.Saved) error {
	for i, d := range m.Disks {
		bytes, err := machine.DiskBytes(m.Dir, d)
		if err != nil {
			return err
		}
		patch := drivePatch{ID: d.Role}
		if bytes != saved.Disks[i].Bytes {
			patch.Path = drivePath(d.Role) // the file has this size already: it is the guest that hears of it
		}
		if m.DiskRate != saved.DiskRate {
			patch.Limit = limitOf(m.DiskRate)
		}
		if patch == (drivePatch{ID: d.Role}) {
			continue
		}
		if err := c.patchDrive(ctx, patch); err != nil {
			return err
		}
	}
	if m.NetRate == saved.NetRate {
		return nil
	}
	for i := range m.NICs {
		if err := c.patchNetwork(ctx, networkPatch{ID: interfaceID(i), RX: limitOf(m.NetRate), TX: limitOf(m.NetRate)}); err != nil {
			return err
		}
	}
	return nil
}
