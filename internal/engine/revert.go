package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"time"

	"banger/internal/capability"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/fileio"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/snapshot"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// The way back to a snapshot: whole copies are made beside the VM's disks, then the row says that it goes back,
// and from there everything can be done again until it is done. Before that row the VM is as it was, after
// it as the snapshot says.

const (
	stageSwap = "swap disks" // the snapshot's take the place of the VM's

	revertMargin = 16 << 20 // bytes, for directories and the like
)

// revertNote is the key in VM.Notes under which the row of a VM says what it is put back to.
const revertNote = "revert"

type revertTo struct {
	Tag    string                     `json:"tag"`
	Memory bool                       `json:"memory"` // else only its disks
	Driver string                     `json:"driver,omitempty"`
	Notes  map[string]capability.Note `json:"notes,omitempty"` // the snapshot's
}

// RestoreOptions say how a VM is put back to a snapshot.
type RestoreOptions struct {
	DisksOnly bool // also when there is memory: the VM is stopped then
	Running   bool // the user knows that what runs is lost; without it a VM that runs is a Conflict fault
}

// RestoreSnapshot puts a VM back to a snapshot. Afterwards it runs when the snapshot has its memory, and is
// stopped otherwise. What was not in a snapshot is lost. Until the snapshot's disks are about to take their
// place, a failure or a cancel leaves the VM as it is; from then on it is finished, by the next daemon if need be.
func (e *Engine) RestoreSnapshot(ctx context.Context, ref, tag string, w RestoreOptions, sink progress.Sink) (vm.VM, error) {
	return e.verb(ctx, ref, "restore", sink, func(ctx context.Context, o *operation) error { return o.revert(ctx, tag, w) })
}

func (o *operation) revert(ctx context.Context, tag string, w RestoreOptions) error {
	o.e.locks.interruptible(o.v.ID, o.cancel)
	var from snapshot.Snapshot
	var to revertTo
	err := o.stage(ctx, stageCheck, func(ctx context.Context) (err error) {
		from, to, err = o.checkRevert(ctx, tag, w)
		return err
	})
	if err != nil {
		return err
	}
	err = o.stage(ctx, stageCopy, func(ctx context.Context) error { return o.prepareRevert(ctx, from, to) })
	if err != nil {
		return errors.Join(err, o.dropRevert())
	}
	if err := o.recordRevert(ctx, to); err != nil {
		return errors.Join(err, o.dropRevert())
	}
	o.e.locks.interruptible(o.v.ID, nil)
	if err := o.finishRevert(ctx); err != nil {
		return err
	}
	if !to.Memory {
		return nil
	}
	return o.start(ctx, vm.AskResume)
}

// checkRevert finds what would keep the VM from being put back. Nothing of it is touched before.
func (o *operation) checkRevert(ctx context.Context, tag string, w RestoreOptions) (from snapshot.Snapshot, to revertTo, err error) {
	name := o.v.Spec.Name
	if _, _, err := vm.Next(o.v.State, vm.AskRevert); err != nil {
		return from, to, fault.Wrap(fault.KindOf(err), err, "VM %s is not put back", name)
	}
	from, err = o.e.snapshotsOf(o.v).Get(tag)
	if err != nil {
		return from, to, err
	}
	if o.v.State == vm.Running && !w.Running {
		return from, to, fault.New(fault.Conflict, "VM %s is running: what it does and what it wrote since the snapshot would be lost", name).
			WithHint("if that is meant: banger vm snapshot restore %s %s --yes", name, tag)
	}
	to = revertTo{Tag: tag, Memory: from.Kind == snapshot.Memory && !w.DisksOnly, Driver: from.Driver, Notes: from.Notes}
	if to.Memory {
		if err := o.checkReviver(ctx, from); err != nil {
			return from, to, err
		}
	}
	if err := o.checkWith(ctx, from); err != nil {
		return from, to, err
	}
	bytes, err := o.diskBytes(from.Dir)
	if err != nil {
		return from, to, err
	}
	return from, to, disk.RequireFree(o.e.c.Paths.VM(o.v.ID), bytes+revertMargin, fmt.Sprintf("the disks of snapshot %s of VM %s", tag, name))
}

// checkReviver finds a driver that would not go on from the memory of a snapshot.
func (o *operation) checkReviver(ctx context.Context, from snapshot.Snapshot) error {
	name := o.v.Spec.Name
	cannot := func(format string, a ...any) error {
		return fault.New(fault.Precondition, "VM %s cannot go on from the memory of snapshot %s: %s", name, from.Tag, fmt.Sprintf(format, a...)).
			WithHint("restore its disks only: banger vm snapshot restore %s %s --disks-only", name, from.Tag)
	}
	driver := o.e.driver(from.Driver)
	if driver == nil {
		return cannot("this daemon has no driver %s", from.Driver)
	}
	if _, ok := driver.(vmm.Restorer); !ok {
		return cannot("%s restores no VMs from memory", from.Driver)
	}
	caps, err := driver.Caps(ctx)
	if err != nil {
		return cannot("%v", err)
	}
	if err := from.CheckMemory(ctx); ctx.Err() != nil {
		return err
	} else if err != nil {
		return cannot("%v", err)
	}
	if caps.Build != from.DriverBuild {
		return cannot("it was saved by another version of %s, %s; this is %s", from.Driver, or(from.DriverBuild, from.DriverVersion), or(caps.Build, caps.Version))
	}
	return nil
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// checkWith asks the capabilities whether the VM could start as the snapshot has it.
func (o *operation) checkWith(ctx context.Context, from snapshot.Snapshot) error {
	v := o.v
	v.Notes = maps.Clone(o.v.Notes)
	maps.Copy(v.Notes, from.Notes)
	for _, c := range o.wanted() {
		if err := c.Check(ctx, v); err != nil {
			return err
		}
	}
	return nil
}

func (o *operation) revertDir() string {
	return filepath.Join(o.e.c.Paths.VM(o.v.ID), paths.RevertNew)
}

// dropRevert removes copies that will not take their place.
func (o *operation) dropRevert() error {
	if err := os.RemoveAll(o.revertDir()); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot remove copies of a snapshot of VM %s", o.v.Spec.Name)
	}
	return nil
}

// prepareRevert makes copies of all that will take its place in the VM's directory, on stable storage.
func (o *operation) prepareRevert(ctx context.Context, from snapshot.Snapshot, to revertTo) error {
	if err := o.dropRevert(); err != nil {
		return err
	}
	dir := o.revertDir()
	err := os.Mkdir(dir, 0o700)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot copy snapshot %s of VM %s", to.Tag, o.v.Spec.Name)
	}
	if err := copyOwnDisks(ctx, dir, from.Dir); err != nil {
		return err
	}
	flushed := []string{dir, filepath.Dir(dir)}
	if to.Memory {
		memory := filepath.Join(dir, paths.Suspended)
		if err := linkMemory(ctx, memory, filepath.Join(from.Dir, snapshot.MemoryDir)); err != nil {
			return err
		}
		if err := o.recordDisks(memory, dir); err != nil {
			return err
		}
		flushed = append(flushed, memory, filepath.Join(memory, paths.SuspendedDisk))
	}
	for _, name := range ownDisks {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			flushed = append(flushed, filepath.Join(dir, name))
		}
	}
	for _, path := range flushed {
		if err := fileio.Flush(path); err != nil {
			return fault.Wrap(fault.Precondition, err, "cannot copy snapshot %s of VM %s", to.Tag, o.v.Spec.Name)
		}
	}
	return nil
}

// recordRevert writes the intent: from now on there is no way but forward.
func (o *operation) recordRevert(ctx context.Context, to revertTo) error {
	note, err := json.Marshal(to)
	if err != nil {
		return err
	}
	before := o.v
	err = o.stage(ctx, stageRecord, func(context.Context) error {
		o.setNote(revertNote, note)
		o.recorded = true
		_, err := o.move(vm.AskRevert)
		return err
	})
	if err != nil {
		o.v, o.recorded = before, false
	}
	return err
}

// finishRevert goes from the intent row to the end. What it does not get done is finished by the next verb or
// reconcile.
func (o *operation) finishRevert(ctx context.Context) error {
	ctx, cancel := o.detached(ctx)
	defer cancel()
	o.recorded = true
	var to revertTo
	if err := json.Unmarshal(o.v.Notes[revertNote], &to); err != nil {
		return fault.Wrap(fault.Unexpected, err, "the row of VM %s does not say what it is put back to", o.v.Spec.Name)
	}
	if err := o.stage(ctx, stageRelease, o.endMachine); err != nil {
		return o.notDown(ctx, err)
	}
	if err := o.capabilitiesDown(ctx); err != nil {
		return o.notDown(ctx, err)
	}
	if err := o.stage(ctx, stageSwap, func(context.Context) error { return o.swapDisks(to) }); err != nil {
		return o.notDown(ctx, err)
	}
	before := o.v
	err := o.stage(ctx, stageDone, func(context.Context) error {
		notes := maps.Clone(o.v.Notes)
		delete(notes, revertNote)
		maps.Copy(notes, to.Notes)
		o.v.Notes, o.v.StartedAt, o.v.Reason = notes, time.Time{}, ""
		event := vm.TakenDown
		if to.Memory {
			event, o.v.Driver = vm.Saved, to.Driver
		}
		_, err := o.move(event)
		return err
	})
	if err != nil { // perhaps only the row could not be written: what it says is what is to be done
		o.v = before
	}
	return err
}

// endMachine ends the VM's process, if there is one.
func (o *operation) endMachine(ctx context.Context) error {
	if m := o.e.takeMachine(o.v.ID); m != nil {
		if err := m.stop(ctx); err != nil {
			return err
		}
		o.v.Handle = nil
		return nil
	}
	return o.killLeftover(ctx)
}

// swapDisks moves each copy to its place. It may be called again: what is not there any more is in its place.
func (o *operation) swapDisks(to revertTo) error {
	dir, from := o.e.c.Paths.VM(o.v.ID), o.revertDir()
	moved := append([]string{}, ownDisks...)
	_, err := os.Stat(filepath.Join(from, paths.Suspended))
	if err == nil || !to.Memory {
		if err := o.dropMemory(); err != nil {
			return err
		}
	}
	if err == nil {
		moved = append(moved, paths.Suspended)
	}
	for _, name := range moved {
		err := os.Rename(filepath.Join(from, name), filepath.Join(dir, name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fault.Wrap(fault.Precondition, err, "cannot put VM %s back to snapshot %s", o.v.Spec.Name, to.Tag)
		}
	}
	if err := fileio.Flush(dir); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot put VM %s back to snapshot %s", o.v.Spec.Name, to.Tag)
	}
	return o.dropRevert()
}

// mendRevert finishes what nobody works on any more.
func (o *operation) mendRevert(ctx context.Context) (string, error) {
	if err := o.finishRevert(ctx); err != nil {
		return "", err
	}
	return fmt.Sprintf("VM %s was being put back to a snapshot: it is %s", o.v.Spec.Name, o.v.State), nil
}

// mendPaused lets a guest go on that stands still and that nobody copies any more.
func (o *operation) mendPaused(ctx context.Context) (string, error) {
	o.recorded = true
	m := o.e.machineOf(o.v.ID)
	held := m != nil
	if !held {
		var err error
		if m, err = o.adoptLeftover(ctx); err != nil {
			return "", err
		}
	}
	if m == nil {
		const reason = "its VMM ended while it was being copied"
		return fmt.Sprintf("VM %s has failed: %s", o.v.Spec.Name, reason), o.died(ctx, reason)
	}
	guest, ok := m.running.(vmm.Pauser)
	if !ok {
		return "", fault.New(fault.Precondition, "%s cannot let VM %s go on", o.v.Driver, o.v.Spec.Name)
	}
	if _, err := o.runOn(ctx, m, guest); err != nil {
		return "", err
	}
	sentence := fmt.Sprintf("VM %s stood still to be copied: it runs on", o.v.Spec.Name)
	if held {
		return sentence, nil
	}
	return sentence, o.takeUp(ctx, m)
}

// sweepCopies removes copies that somebody was making when the daemon died.
func (o *operation) sweepCopies() error {
	err := errors.Join(o.e.snapshotsOf(o.v).Sweep(), os.RemoveAll(o.file(paths.Forked)))
	if o.v.State != vm.Reverting {
		err = errors.Join(err, o.dropRevert())
	}
	return err
}
