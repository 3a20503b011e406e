package qemu

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"banger/internal/fault"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// stateFD is the descriptor under which a restored QEMU inherits its state, behind the lock.
const stateFD = 4

// CheckSaved compares what was saved with this QEMU, this host and m.
func (d *Driver) CheckSaved(ctx context.Context, m vmm.Machine, dir string) error {
	_, err := d.checkSaved(ctx, m, dir)
	return err
}

func (d *Driver) checkSaved(ctx context.Context, m vmm.Machine, dir string) (machine.Saved, error) {
	caps, err := d.Caps(ctx)
	if err != nil {
		return machine.Saved{}, err
	}
	if err := checkMachine(m); err != nil {
		return machine.Saved{}, err
	}
	saved, err := machine.ReadSaved(dir)
	if err != nil {
		return saved, err
	}
	now := machine.Saved{
		VMM: Name, Build: caps.Build, Accelerator: caps.Accelerator, CPUModel: machine.HostCPU(caps.Accelerator),
	}
	if m.Balloon && saved.Memory != nil {
		return saved, fault.New(fault.Precondition, "a balloon would punch holes into the memory in %s, which others share", dir)
	}
	if now.Layout, err = fittingLayout(d.platform, caps.Accelerator, m, saved.Layout); err != nil {
		return saved, err
	}
	return saved, saved.Check(ctx, now, m, dir)
}

// fittingLayout is m's layout; or the saved one, when that is m's on the processor of an earlier build. A guest's kernel looks at
// the processor when it boots, and the saved state has nothing of what the two differ by.
func fittingLayout(p platform, accelerator string, m vmm.Machine, saved string) (string, error) {
	now, err := layout(p, accelerator, m)
	if err != nil || now == saved {
		return now, err
	}
	for _, p.softwareCPU = range p.softwareCPUsBefore {
		before, err := layout(p, accelerator, m)
		if err != nil || before == saved {
			return before, err
		}
	}
	return now, nil
}

// Restore starts QEMU, lets it load the state, and lets the guest run.
func (d *Driver) Restore(ctx context.Context, m vmm.Machine, dir string) (vmm.Running, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	saved, err := d.checkSaved(ctx, m, dir)
	if err != nil {
		return nil, err
	}
	// They are in the memory.
	m.Kernel, m.Initramfs, m.MemoryFile = "", "", ""
	if err := machine.CheckHost(m); err != nil {
		return nil, err
	}
	var mem memory
	if saved.Memory != nil {
		mem.file = filepath.Join(dir, vmm.SavedMemory)
	}
	args, err := restoreArguments(d.platform, saved.Accelerator, m, mem)
	if err != nil {
		return nil, err
	}
	state, err := os.Open(filepath.Join(dir, vmm.SavedState))
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot restore %s", m.Name)
	}
	defer state.Close()
	return d.bringUp(ctx, m, saved.Accelerator, args, state,
		func(ctx context.Context, mon *monitor) error { return load(ctx, mon, m, saved) })
}

// load reads the state and starts the guest.
func load(ctx context.Context, mon *monitor, m vmm.Machine, saved machine.Saved) error {
	if err := prepareMigration(ctx, mon); err != nil {
		return err
	}
	in := command{name: "migrate-incoming", args: map[string]any{"uri": fmt.Sprintf("fd:%d", stateFD)}}
	if err := mon.call(ctx, in, nil); err != nil {
		return err
	}
	if err := awaitMigration(ctx, mon); err != nil {
		return err
	}
	for i, d := range m.Disks {
		bytes, err := machine.DiskBytes(m.Dir, d)
		if err != nil {
			return err
		}
		if bytes == saved.Disks[i].Bytes {
			continue
		}
		// The file has this size already: it is the guest that hears of it.
		err = mon.call(ctx, command{name: "block_resize", args: map[string]any{"node-name": d.Role, "size": bytes}}, nil)
		if err != nil {
			return err
		}
	}
	return mon.callFor(ctx, "cont", nil)
}
