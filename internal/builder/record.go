package builder

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"banger/internal/fault"
	"banger/internal/vm"
)

// Suffixes of the records of builds: one is under way, and one failed and has left its VM.
const (
	recordSuffix = ".under-way"
	keptSuffix   = ".kept"
)

// record notes that a build is under way, by the name that all it makes begins with. forget takes the note away.
func (b *Builder) record(id string) (forget func() error, err error) {
	path := filepath.Join(b.o.Paths.Builds(), id+recordSuffix)
	b.mu.Lock()
	b.busy[id] = true
	b.mu.Unlock()
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		b.over(id)
		return nil, fault.Wrap(fault.Precondition, err, "cannot begin a build")
	}
	return func() error { return gone(os.Remove(path)) }, nil
}

// over says that nobody is at work on a build any more: what it left may be taken back.
func (b *Builder) over(id string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.busy, id)
}

func (b *Builder) underWay(id string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.busy[id]
}

func isGone(path string) bool {
	_, err := os.Lstat(path)
	return errors.Is(err, os.ErrNotExist)
}

func gone(err error) error {
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// markKept says of a build that it is over, and that its VM was left to look into: only what is of no use without the VM
// is taken back.
func (b *Builder) markKept(id string) error {
	path := filepath.Join(b.o.Paths.Builds(), id)
	return os.Rename(path+recordSuffix, path+keptSuffix)
}

// forgetKept removes the base images of VMs that were left to look into and that somebody has deleted since.
func (b *Builder) forgetKept(ctx context.Context) (told []string) {
	found, err := filepath.Glob(filepath.Join(b.o.Paths.Builds(), "build-*"+keptSuffix))
	if err != nil {
		return []string{err.Error()}
	}
	if len(found) == 0 {
		return nil
	}
	vms, err := b.o.Machines.List(ctx)
	if err != nil {
		return []string{err.Error()}
	}
	for _, path := range found {
		id := strings.TrimSuffix(filepath.Base(path), keptSuffix)
		if slices.ContainsFunc(vms, func(v vm.VM) bool { return v.Spec.Name == id || v.Spec.Image == baseOf(id) }) {
			continue // it is still looked into, or was forked
		}
		if err := errors.Join(b.removeBase(ctx, id), gone(os.Remove(path))); err != nil {
			told = append(told, "not taken back: "+id+": "+err.Error())
		}
	}
	return told
}

func (b *Builder) removeBase(ctx context.Context, id string) error {
	err := b.o.Images.Delete(ctx, baseOf(id), func(string) error { return nil })
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}

// Reconcile takes back what builds of a daemon that died have left, and those that could not do so themselves: their VMs
// and base images. It returns what it did and what it could not do, a line each.
func (b *Builder) Reconcile(ctx context.Context) (told []string) {
	found, err := filepath.Glob(filepath.Join(b.o.Paths.Builds(), "build-*"+recordSuffix))
	if err != nil {
		return []string{err.Error()}
	}
	for _, path := range found {
		id := strings.TrimSuffix(filepath.Base(path), recordSuffix)
		if b.underWay(id) || isGone(path) { // in this order: a build that ends renames or removes its record first
			continue
		}
		err := b.removeVM(ctx, id)
		if err == nil {
			err = b.removeBase(ctx, id)
		}
		if err == nil {
			err = gone(os.Remove(path))
		}
		if err != nil {
			told = append(told, "not taken back: "+id+": "+err.Error())
			continue
		}
		told = append(told, "took back what an interrupted build left: "+id)
	}
	return append(told, b.forgetKept(ctx)...)
}
