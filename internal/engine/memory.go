package engine

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"time"

	"banger/internal/fault"
	"banger/internal/fileio"
	"banger/internal/paths"
)

// A saved memory lies in the VM's directory: what the driver wrote, and which disks it belongs to. It has
// its name only when it is whole and on stable storage.

// diskRecord is a disk as it was when the memory was saved. The guest's memory holds parts of what is on
// it, so it goes on with no other.
type diskRecord struct {
	Size    int64     `json:"size_bytes"`
	Changed time.Time `json:"changed_at"`
}

// ownDisks are the disks that a VM writes to.
var ownDisks = []string{paths.OverlayDisk, paths.WorkDisk}

// readDisks looks at the VM's disks in dir as they are now.
func (o *operation) readDisks(dir string) (map[string]diskRecord, error) {
	records := map[string]diskRecord{}
	for _, name := range ownDisks {
		info, err := os.Stat(filepath.Join(dir, name))
		if errors.Is(err, os.ErrNotExist) { // not every VM has each
			continue
		}
		if err != nil {
			return nil, fault.Wrap(fault.Precondition, err, "cannot look at a disk of VM %s", o.v.Spec.Name)
		}
		records[name] = diskRecord{Size: info.Size(), Changed: info.ModTime().UTC()}
	}
	return records, nil
}

// recordDisks says in memory, a directory, that the disks in dir are those it belongs to.
func (o *operation) recordDisks(memory, dir string) error {
	disks, err := o.readDisks(dir)
	if err != nil {
		return err
	}
	record, err := json.Marshal(disks)
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(memory, paths.SuspendedDisk), record, 0o600); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write which disks the memory of VM %s belongs to", o.v.Spec.Name)
	}
	return nil
}

func (o *operation) memoryDir() string {
	return filepath.Join(o.e.c.Paths.VM(o.v.ID), paths.Suspended)
}

func (o *operation) newMemoryDir() string {
	return filepath.Join(o.e.c.Paths.VM(o.v.ID), paths.SuspendedNew)
}

// dropMemory removes saved memory, whole or half written; there may be none. The name of a whole one
// goes first: what is half removed must not look whole.
func (o *operation) dropMemory() error {
	err := os.RemoveAll(o.newMemoryDir())
	if err == nil {
		err = os.Rename(o.memoryDir(), o.newMemoryDir())
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err == nil {
		err = os.RemoveAll(o.newMemoryDir())
	}
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot remove the saved memory of VM %s", o.v.Spec.Name)
	}
	return nil
}

func memoryDropped(name string) string {
	return "the saved memory of VM " + name + " is dropped"
}

// keepMemory makes what the driver wrote the VM's saved memory: with the disks it belongs to, on stable
// storage, under its name. The guest stands still.
func (o *operation) keepMemory() error {
	err := o.sealMemory()
	if err == nil {
		return nil
	}
	return fault.Wrap(fault.Precondition, err, "cannot keep the memory of VM %s", o.v.Spec.Name)
}

func (o *operation) sealMemory() error {
	dir := o.e.c.Paths.VM(o.v.ID)
	if err := o.recordDisks(o.newMemoryDir(), dir); err != nil {
		return err
	}
	disks, err := o.readDisks(dir)
	if err != nil {
		return err
	}
	for name := range disks { // what the guest wrote last may still be in the host's cache only
		if err := fileio.Flush(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	files, err := filepath.Glob(filepath.Join(o.newMemoryDir(), "*"))
	if err != nil {
		return err
	}
	for _, file := range append(files, o.newMemoryDir()) {
		if err := fileio.Flush(file); err != nil {
			return err
		}
	}
	if err := os.Rename(o.newMemoryDir(), o.memoryDir()); err != nil {
		return err
	}
	return fileio.Flush(dir)
}

// hasMemory tells whether there is a whole saved memory.
func (o *operation) hasMemory() bool {
	_, err := os.Stat(o.memoryDir())
	return err == nil
}

// checkMemory finds saved memory that is missing, or that the disks do not belong to any more.
func (o *operation) checkMemory() error {
	name := o.v.Spec.Name
	raw, err := os.ReadFile(filepath.Join(o.memoryDir(), paths.SuspendedDisk))
	if errors.Is(err, os.ErrNotExist) {
		return fault.New(fault.Precondition, "the saved memory of VM %s is missing: %s", name, o.memoryDir())
	}
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot read the saved memory of VM %s", name)
	}
	var saved map[string]diskRecord
	if err := json.Unmarshal(raw, &saved); err != nil {
		return fault.Wrap(fault.Precondition, err, "the saved memory of VM %s is damaged: %s", name, paths.SuspendedDisk)
	}
	now, err := o.readDisks(o.e.c.Paths.VM(o.v.ID))
	if err != nil {
		return err
	}
	for _, disk := range ownDisks {
		if saved[disk] != now[disk] {
			return fault.New(fault.Precondition, "%s of VM %s was changed since its memory was saved: to go on from it would damage what is on the disk",
				disk, name)
		}
	}
	return nil
}
