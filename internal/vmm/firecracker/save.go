package firecracker

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"

	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// newSnapshot is where Firecracker writes, in the machine's directory: it can write nowhere else.
const newSnapshot = "snapshot.new"

// Save writes the machine's state and memory.
func (r *running) Save(ctx context.Context, dir string) error {
	sealed, err := r.Write(ctx, dir)
	if err != nil {
		return err
	}
	if err := sealed(ctx); err != nil {
		return err
	}
	if r.facts.MemoryFile != "" {
		r.mu.Lock()
		r.void = dir
		r.mu.Unlock()
	}
	return nil
}

// Write is the part of Save for which the guest has to stand still.
func (r *running) Write(ctx context.Context, dir string) (sealed func(context.Context) error, err error) {
	release, err := r.hold()
	if err != nil {
		return nil, err
	}
	defer release()
	manifest, err := r.manifest(ctx, dir)
	if err != nil {
		return nil, err
	}
	own := r.facts.MemoryFile == ""
	err = r.snapshot(ctx)
	if err == nil {
		r.saved = true
		err = r.handOver(ctx, dir)
	}
	if err != nil {
		return nil, errors.Join(err, removeSaved(dir, own))
	}
	return func(ctx context.Context) error {
		if err := seal(ctx, dir, manifest); err != nil {
			return errors.Join(err, removeSaved(dir, own))
		}
		return nil
	}, nil
}

// seal makes what was written small, durable and known by its manifest. Firecracker writes all of the memory, most of
// which is zero as a rule.
func seal(ctx context.Context, dir string, manifest machine.Saved) error {
	if err := disk.Dig(ctx, filepath.Join(dir, vmm.SavedMemory)); err != nil {
		kind := fault.Precondition
		if ctx.Err() != nil {
			kind = fault.KindOf(ctx.Err())
		}
		return fault.Wrap(kind, err, "cannot write the saved machine in %s", dir)
	}
	return machine.WriteSaved(ctx, dir, manifest, true)
}

// manifest asks Firecracker what it is, and finds reasons not to save the machine.
func (r *running) manifest(ctx context.Context, dir string) (machine.Saved, error) {
	var s machine.Saved
	state, err := r.api.state(ctx)
	switch {
	case err != nil:
		return s, err
	case state != statePaused:
		return s, fault.New(fault.Conflict, "the machine %s runs: it can be saved when it is paused", r.name)
	case r.saved:
		return s, fault.New(fault.Conflict, "the machine %s was saved already and has not run since", r.name)
	}
	if err := r.facts.Saveable(r.name, dir); err != nil {
		return s, err
	}
	v, err := r.api.version(ctx)
	if err != nil {
		return s, err
	}
	s = r.facts.Saved()
	s.VMM, s.Build, s.CPUModel = Name, v.String(), machine.HostCPU(accelerator)
	return s, nil
}

// snapshot has Firecracker write into newSnapshot. It cannot be told to stop: when ctx ends first, what it goes on
// writing is removed when it is done, and until then it answers nothing else.
func (r *running) snapshot(ctx context.Context) error {
	r.awaitWritten(ctx)
	if err := ctx.Err(); err != nil {
		return fault.Wrap(fault.KindOf(err), err, "cannot save %s", r.name)
	}
	dir := filepath.Join(r.dir, newSnapshot)
	err := os.RemoveAll(dir)
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err == nil {
		err = giveLike(r.dir, dir)
	}
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot save %s", r.name)
	}
	written, done := make(chan error, 1), make(chan struct{})
	r.writing = done
	go func() {
		defer close(done)
		err := r.api.create(r.life, snapshotCreate{
			State: filepath.Join(newSnapshot, vmm.SavedState), Memory: filepath.Join(newSnapshot, vmm.SavedMemory),
		}, r.facts.MemoryBytes)
		if err != nil || ctx.Err() != nil {
			_ = os.RemoveAll(dir) // the next save, or start, does it again
		}
		written <- err
	}()
	select {
	case err = <-written:
	case <-ctx.Done():
	}
	if ctx.Err() != nil {
		return fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err(), "cannot save %s", r.name)
	}
	return r.told(err)
}

// awaitWritten waits for a snapshot that somebody gave up. The caller has the machine's turn.
func (r *running) awaitWritten(ctx context.Context) {
	if r.writing == nil {
		return
	}
	select {
	case <-r.writing:
	case <-ctx.Done():
	}
}

// told turns the error of a process that has gone into that of a machine that has ended.
func (r *running) told(err error) error {
	if err != nil && r.life.Err() != nil {
		return fault.Wrap(fault.Conflict, err, "the machine %s has ended", r.name)
	}
	return err
}

// handOver moves what was written into dir.
func (r *running) handOver(ctx context.Context, dir string) error {
	from := filepath.Join(r.dir, newSnapshot)
	for _, name := range []string{vmm.SavedState, vmm.SavedMemory} {
		if err := move(ctx, filepath.Join(from, name), filepath.Join(dir, name)); err != nil {
			kind, hint := fault.Precondition, ""
			if errors.Is(err, syscall.ENOSPC) {
				hint = "free some space on this disk"
			}
			if ctx.Err() != nil {
				kind, err = fault.KindOf(ctx.Err()), ctx.Err()
			}
			_ = os.RemoveAll(from) // the next save, or start, does it again
			return fault.Wrap(kind, err, "cannot save %s", r.name).WithHint("%s", hint)
		}
	}
	return os.Remove(from)
}

// move gives a file another name, on another file system if need be. Firecracker made it, which may be a guest's by now:
// what is no plain file is not followed to what it leads to.
func move(ctx context.Context, from, to string) error {
	if err := takeOver(from); err != nil {
		return err
	}
	err := os.Rename(from, to)
	if !errors.Is(err, syscall.EXDEV) {
		return err
	}
	// CloneFile wants to make its file.
	if err := os.Remove(to); err != nil && !os.IsNotExist(err) {
		return err
	}
	if err := disk.CloneFile(ctx, to, from); err != nil {
		return err
	}
	return os.Remove(from)
}

// takeOver makes a plain file ours alone.
func takeOver(path string) error {
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NOFOLLOW|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return &os.PathError{Op: "take over", Path: path, Err: errors.New("not a regular file")}
	}
	return errors.Join(f.Chown(os.Geteuid(), os.Getegid()), f.Chmod(0o600))
}
