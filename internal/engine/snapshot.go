package engine

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sync/errgroup"

	"banger/internal/capability"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/snapshot"
	"banger/internal/vm"
	"banger/internal/vmm"
)

const (
	stageClock = "clock" // of a guest that stood still
	stageSeal  = "seal"  // what was saved is flushed and summed up, while the guest runs again
)

// SnapshotOptions are the user's words about a snapshot.
type SnapshotOptions struct {
	Tag    string // empty: made from the time
	Note   string
	Labels map[string]string
}

// CreateSnapshot copies the disks of a VM, and the memory of one that runs or is suspended. A running one
// stands still meanwhile. When it fails or is cancelled there is no snapshot, and the VM is as before.
func (e *Engine) CreateSnapshot(ctx context.Context, ref string, w SnapshotOptions, sink progress.Sink) (made snapshot.Snapshot, err error) {
	if err := snapshot.CheckText(w.Note, w.Labels); err != nil {
		return made, err
	}
	_, err = e.verb(ctx, ref, "snapshot", sink, func(ctx context.Context, o *operation) (err error) {
		made, err = o.snapshot(ctx, w)
		return err
	})
	return made, err
}

// Snapshots returns all snapshots of a VM, oldest first, those that are damaged as well. It waits for nobody.
func (e *Engine) Snapshots(ctx context.Context, ref string) ([]snapshot.Snapshot, error) {
	v, err := e.c.Store.Get(ctx, ref)
	if err != nil {
		return nil, err
	}
	return e.snapshotsOf(v).List()
}

// Snapshot returns one snapshot of a VM. It waits for nobody.
func (e *Engine) Snapshot(ctx context.Context, ref, tag string) (snapshot.Snapshot, error) {
	v, err := e.c.Store.Get(ctx, ref)
	if err != nil {
		return snapshot.Snapshot{}, err
	}
	return e.snapshotsOf(v).Get(tag)
}

// DeleteSnapshot removes a snapshot; the VM stays as it is.
func (e *Engine) DeleteSnapshot(ctx context.Context, ref, tag string) error {
	_, o, err := e.begin(ctx, ref, "snapshot", nil)
	if err != nil {
		return err
	}
	defer o.end()
	return e.snapshotsOf(o.v).Delete(tag)
}

func (e *Engine) snapshotsOf(v vm.VM) snapshot.Store {
	return snapshot.Open(filepath.Join(e.c.Paths.VM(v.ID), paths.Snapshots), v.Spec.Name)
}

func (o *operation) snapshot(ctx context.Context, w SnapshotOptions) (made snapshot.Snapshot, err error) {
	o.e.locks.interruptible(o.v.ID, o.cancel)
	all := o.e.snapshotsOf(o.v)
	var manifest snapshot.Manifest
	err = o.stage(ctx, stageCheck, func(ctx context.Context) error {
		manifest, err = o.checkSnapshot(ctx, all, w)
		return err
	})
	if err != nil {
		return made, err
	}
	dir, err := all.Make(manifest.Tag)
	if err != nil {
		return made, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, all.Discard(dir))
		}
	}()
	if o.v.State == vm.Running {
		manifest.PausedFor, err = o.copyRunning(ctx, filepath.Join(dir, snapshot.MemoryDir), dir)
	} else {
		err = o.stage(ctx, stageCopy, func(ctx context.Context) error { return o.copyStill(ctx, dir) })
	}
	if err != nil {
		return made, err
	}
	err = o.stage(ctx, stageKeep, func(ctx context.Context) error {
		made, err = all.Keep(ctx, dir, manifest)
		return err
	})
	return made, err
}

// checkSnapshot finds what would keep a snapshot from being made, and says what it will be.
func (o *operation) checkSnapshot(ctx context.Context, all snapshot.Store, w SnapshotOptions) (m snapshot.Manifest, err error) {
	name := o.v.Spec.Name
	if _, _, err := vm.Next(o.v.State, vm.AskCopy); err != nil {
		return m, fault.Wrap(fault.KindOf(err), err, "there is no snapshot of VM %s", name)
	}
	if o.v.Spec.Ephemeral {
		return m, fault.New(fault.Conflict, "there is no snapshot of VM %s: it was made to be deleted when its machine ends", name)
	}
	m = snapshot.Manifest{
		Tag: w.Tag, CreatedAt: o.e.c.Now().UTC(), Note: w.Note, Labels: w.Labels, Kind: snapshot.Disk, State: string(o.v.State),
		Image: o.v.Spec.Image, Kernel: o.v.Spec.Kernel, Notes: o.inherited(),
	}
	if m.Tag == "" {
		if m.Tag, err = all.FreeTag(m.CreatedAt); err != nil {
			return m, err
		}
	}
	if err := all.CheckNew(m.Tag); err != nil {
		return m, err
	}
	bytes, err := o.diskBytes(o.e.c.Paths.VM(o.v.ID))
	if err != nil {
		return m, err
	}
	if o.v.State == vm.Running || o.v.State == vm.Suspended {
		m.Kind = snapshot.Memory
		if err := o.nameDriver(ctx, &m); err != nil {
			return m, err
		}
	}
	switch o.v.State {
	case vm.Running:
		bytes += o.v.Spec.MemoryBytes + saveMargin
		_, _, err = o.checkSaveable()
	case vm.Suspended:
		err = o.checkMemory()
	}
	if err != nil {
		return m, err
	}
	return m, disk.RequireFree(o.e.c.Paths.VM(o.v.ID), bytes, "a snapshot of VM "+name)
}

// nameDriver notes which build of which driver goes on from the memory.
func (o *operation) nameDriver(ctx context.Context, m *snapshot.Manifest) error {
	driver := o.e.driver(o.v.Driver)
	if driver == nil {
		return fault.New(fault.Precondition, "VM %s was started by the driver %s, which this daemon does not have", o.v.Spec.Name, o.v.Driver)
	}
	caps, err := driver.Caps(ctx)
	m.Driver, m.DriverVersion, m.DriverBuild = o.v.Driver, caps.Version, caps.Build
	return err
}

// inherited are the notes about what is on the VM's disks and in its memory.
func (o *operation) inherited() map[string]capability.Note {
	notes := map[string]capability.Note{}
	for _, c := range o.e.c.Capabilities {
		if _, ok := c.(capability.Inheriter); ok && o.v.Notes[c.Name()] != nil {
			notes[c.Name()] = o.v.Notes[c.Name()]
		}
	}
	return notes
}

// diskBytes is what the VM's disks in dir take. A VM that never started has none.
func (o *operation) diskBytes(dir string) (total int64, err error) {
	found := false
	for _, name := range ownDisks {
		bytes, err := disk.AllocatedBytes(filepath.Join(dir, name))
		if errors.Is(err, os.ErrNotExist) { // not every VM has each
			continue
		}
		if err != nil {
			return 0, err
		}
		found, total = true, total+bytes
	}
	if !found {
		return 0, fault.New(fault.Precondition, "VM %s has no disks yet: they are made when it first starts", o.v.Spec.Name).
			WithHint("start it: banger vm start %s", o.v.Spec.Name)
	}
	return total, nil
}

// copyOwnDisks copies the disks of a VM that stands still.
func copyOwnDisks(ctx context.Context, to, from string) error {
	for _, name := range ownDisks {
		err := disk.CloneFile(ctx, filepath.Join(to, name), filepath.Join(from, name))
		if err != nil && fault.KindOf(err) != fault.NotFound { // not every VM has each
			return err
		}
	}
	return nil
}

// copyStill copies the disks of a VM without a process, and the memory of a suspended one.
func (o *operation) copyStill(ctx context.Context, dir string) error {
	if o.v.State == vm.Suspended {
		if err := linkMemory(ctx, filepath.Join(dir, snapshot.MemoryDir), o.memoryDir()); err != nil {
			return err
		}
	}
	return copyOwnDisks(ctx, dir, o.e.c.Paths.VM(o.v.ID))
}

// linkMemory gives saved memory a second place, to. Nobody ever writes to these files, so they are shared;
// which disks the memory belongs to is not taken along.
func linkMemory(ctx context.Context, to, from string) error {
	if err := os.Mkdir(to, 0o700); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot copy saved memory")
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot copy saved memory")
	}
	for _, e := range entries {
		if e.Name() == paths.SuspendedDisk {
			continue
		}
		if os.Link(filepath.Join(from, e.Name()), filepath.Join(to, e.Name())) == nil {
			continue
		}
		if err := copyMemory(ctx, filepath.Join(to, e.Name()), filepath.Join(from, e.Name())); err != nil { // a file system without links
			return err
		}
	}
	return nil
}

// copyMemory copies a file with its time, by which a driver knows that nobody has written to it.
func copyMemory(ctx context.Context, to, from string) error {
	info, err := os.Stat(from)
	if err == nil {
		err = disk.CloneFile(ctx, to, from)
	}
	if err == nil {
		err = os.Chtimes(to, info.ModTime(), info.ModTime())
	}
	return err
}

// copyRunning saves memory and disks of one moment of the guest's life, each in its directory, and tells how long its
// programs stood still. Whatever fails, the guest runs on.
func (o *operation) copyRunning(ctx context.Context, memory, disks string) (paused time.Duration, err error) {
	m, guest, err := o.checkSaveable()
	if err != nil {
		return 0, err
	}
	if err := os.Mkdir(memory, 0o700); err != nil {
		return 0, fault.Wrap(fault.Precondition, err, "cannot save the memory of VM %s", o.v.Spec.Name)
	}
	var begin time.Time
	err = o.stage(ctx, stageQuiesce, func(ctx context.Context) error {
		held, err := o.quiesce(ctx, m, true)
		begin = o.e.c.Now().Add(-held)
		return err
	})
	if err != nil {
		return 0, err
	}
	err = o.stage(ctx, stageRecord, func(context.Context) error {
		o.recorded = true
		_, err := o.move(vm.AskCopy)
		return err
	})
	var seal func(context.Context) error
	if err == nil {
		o.recorded = false // the row says what it has to: each write of it would make the pause longer
		seal, err = o.copyPaused(ctx, guest, memory, disks)
		o.recorded = true
	}
	if o.v.State != vm.Paused {
		o.letGo(ctx, m)
		return 0, err
	}
	went, errOn := o.runOn(ctx, m, guest)
	if err = errors.Join(err, errOn); err == nil {
		err = o.stage(ctx, stageSeal, seal)
	}
	return went.Sub(begin), err
}

// copyPaused halts the guest and copies. What was saved is whole when seal has returned.
func (o *operation) copyPaused(ctx context.Context, guest saveable, memory, disks string) (seal func(context.Context) error, err error) {
	err = o.stage(ctx, stagePause, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, pauseTimeout)
		defer cancel()
		return guest.Pause(ctx)
	})
	if err != nil {
		return nil, err
	}
	err = o.stage(ctx, stageSave, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, saveTimeout)
		defer cancel()
		both, ctx := errgroup.WithContext(ctx)
		both.Go(func() (err error) { seal, err = write(ctx, guest, memory); return err })
		both.Go(func() error { return copyOwnDisks(ctx, disks, o.e.c.Paths.VM(o.v.ID)) })
		return both.Wait()
	})
	return seal, err
}

// write saves a guest, and leaves what it need not stand still for to seal, when the driver can.
func write(ctx context.Context, guest saveable, dir string) (seal func(context.Context) error, err error) {
	if w, ok := guest.(vmm.Writer); ok {
		return w.Write(ctx, dir)
	}
	return func(context.Context) error { return nil }, guest.Save(ctx, dir)
}
