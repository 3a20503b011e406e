package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"

	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// A fork goes on in three steps. With the source in hand: rows of the children, which a daemon that dies leaves to be
// taken back, and then memory and disks while the guest stands still. From then on the source is anybody's again.
// Disks for the further children. And all children at once, each from the one saved memory.

// MaxForks bounds how many VMs one fork makes.
const MaxForks = 32

const (
	stageCopy     = "copy disks" // while the guest stands still, or of one that is stopped
	stageGoOn     = "go on"      // the source runs again
	stageFurther  = "further disks"
	stageChildren = "children" // restored, each with an identity of its own
)

// ForkOptions says what is made of a running VM.
type ForkOptions struct {
	Name      string // of the first child, the others are NAME-2, NAME-3...; empty: the first free ones of VM-fork-1...
	Count     int    // 0: 1
	Ephemeral bool   // children are deleted when their machines end
}

// Forked is what became of a fork.
type Forked struct {
	VMs    []vm.VM
	Paused time.Duration // how long the source stood still
}

// fork is one fork under way.
type fork struct {
	e        *Engine
	sink     progress.Sink
	children []*child
	paused   time.Duration
}

// child is a VM that is being made of another one. Its lock is held until the fork is done.
type child struct {
	*operation
	ctx context.Context // ends also when somebody deletes it meanwhile
}

// Fork makes further VMs of a running one, which stands still for a moment and runs on. When it fails or is
// cancelled none of them is left.
func (e *Engine) Fork(ctx context.Context, ref string, w ForkOptions, sink progress.Sink) (done Forked, err error) {
	w.Count = max(w.Count, 1)
	if w.Count > MaxForks {
		return Forked{}, fault.New(fault.Usage, "cannot make %d forks at once", w.Count).WithHint("make at most %d", MaxForks)
	}
	f := &fork{e: e, sink: sink}
	defer f.end()
	work, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	_, err = e.verb(work, ref, "fork", sink, func(ctx context.Context, o *operation) error { return f.split(ctx, work, o, w) })
	if err == nil {
		err = f.furtherDisks(work)
	}
	if err == nil {
		err = f.bringUp(work)
	}
	if err != nil {
		return Forked{}, errors.Join(err, f.takeBack(work))
	}
	if err := os.RemoveAll(f.memory()); err != nil { // they run all the same; the next daemon tries again
		sink.Notice(fmt.Sprintf("the memory that the forks were made of is left: %v", err))
	}
	done.Paused = f.paused
	for _, c := range f.children {
		done.VMs = append(done.VMs, c.v)
	}
	return done, nil
}

// memory is where the saved memory lies that all children go on from: it goes with the first one.
func (f *fork) memory() string { return f.children[0].file(paths.Forked) }

// file is a file of the VM's own.
func (o *operation) file(name string) string { return filepath.Join(o.e.c.Paths.VM(o.v.ID), name) }

// split is the source's part. work outlives the operation on the source.
func (f *fork) split(ctx, work context.Context, o *operation, w ForkOptions) error {
	if err := o.forkable(); err != nil {
		return err
	}
	o.e.locks.interruptible(o.v.ID, o.cancel)
	if _, _, err := o.checkSaveable(); err != nil {
		return err
	}
	if _, _, err := o.check(ctx, o.v.Driver); err != nil {
		return err
	}
	if err := o.roomForCopies(w.Count, o.v.Spec.MemoryBytes+saveMargin); err != nil {
		return err
	}
	names, err := o.e.childNames(ctx, o.v.Spec.Name, "fork", w.Name, w.Count)
	if err != nil {
		return err
	}
	err = o.stage(ctx, stageRecord, func(context.Context) error {
		for _, name := range names {
			if err := f.conceive(work, o, name, w.Ephemeral); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	first := f.children[0].operation
	if err := first.makeDir(); err != nil {
		return err
	}
	f.paused, err = o.copyRunning(ctx, f.memory(), first.e.c.Paths.VM(first.v.ID))
	return err
}

// forkable says why a VM that does not run has no forks.
func (o *operation) forkable() error {
	name := o.v.Spec.Name
	if o.v.State == vm.Running {
		return nil
	}
	refusal := fault.New(fault.Conflict, "VM %s is not forked: it is %s", name, o.v.State)
	switch o.v.State {
	case vm.Stopped, vm.Failed:
		return refusal.WithHint("make a copy of its disks: banger vm clone %s", name)
	case vm.Suspended:
		return refusal.WithHint("resume it first: banger vm resume %s", name)
	}
	return refusal.WithHint("wait until that is done, then try again")
}

// checkSaveable finds what keeps a running VM from being saved.
func (o *operation) checkSaveable() (*machine, saveable, error) {
	m := o.e.machineOf(o.v.ID)
	if m == nil {
		return nil, nil, notHeld(o.v.Spec.Name)
	}
	guest, ok := m.running.(saveable)
	if _, restores := o.e.driver(o.v.Driver).(vmm.Restorer); !ok || !restores {
		return nil, nil, fault.New(fault.Precondition, "%s cannot save the memory of VM %s", o.v.Driver, o.v.Spec.Name)
	}
	return m, guest, nil
}

// conceive writes the row of a child. Until it runs, whoever finds it alone takes it back.
func (f *fork) conceive(ctx context.Context, source *operation, name string, ephemeral bool) error {
	c, err := f.e.beginChild(ctx, source, name, "fork")
	if err != nil {
		return err
	}
	c.sink = f.sink.Notices()
	f.children = append(f.children, c)
	c.v.Spec.Ephemeral = ephemeral
	return c.insert(c.ctx)
}

// runOn lets a guest go on that stood still, whatever became of the caller, and tells when its programs did. The row says
// so when its clock is right.
func (o *operation) runOn(ctx context.Context, m *machine, guest vmm.Pauser) (went time.Time, err error) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pauseTimeout+clockTimeout)
	defer cancel()
	err = o.stage(ctx, stageGoOn, func(ctx context.Context) error {
		if m.ended() { // that is its watcher's
			return nil
		}
		if err := guest.Resume(ctx); err != nil {
			return fault.Wrap(fault.KindOf(err), err, "VM %s does not go on", o.v.Spec.Name).
				WithHint("start it anew: banger vm restart %s", o.v.Spec.Name)
		}
		return nil
	})
	if err != nil {
		return o.e.c.Now(), err
	}
	err = o.stage(ctx, stageClock, func(ctx context.Context) error {
		if !m.ended() {
			o.setClock(ctx, m)
			o.letGo(ctx, m)
		}
		went = o.e.c.Now()
		_, err := o.move(vm.Copied)
		return err
	})
	return went, err
}

// furtherDisks copies the first child's disks for the others: it has not run yet.
func (f *fork) furtherDisks(ctx context.Context) error {
	if len(f.children) == 1 {
		return nil
	}
	return f.sink.Run(stageFurther, func() error {
		g, ctx := errgroup.WithContext(ctx)
		g.SetLimit(runtime.NumCPU())
		for _, c := range f.children[1:] {
			g.Go(func() error {
				return c.stage(ctx, stageCopy, func(ctx context.Context) error { return copyDisks(ctx, c.operation, f.children[0].operation) })
			})
		}
		return g.Wait()
	})
}

// bringUp restores all children. The first failure ends the others.
func (f *fork) bringUp(ctx context.Context) error {
	return f.sink.Run(stageChildren, func() error {
		g, all := errgroup.WithContext(ctx)
		g.SetLimit(runtime.NumCPU())
		var up atomic.Int32
		for _, c := range f.children {
			g.Go(func() error {
				ctx, cancel := context.WithCancelCause(c.ctx)
				defer cancel(nil)
				defer context.AfterFunc(all, func() { cancel(context.Cause(all)) })()
				if err := c.goOnFrom(ctx, f.memory()); err != nil {
					return fmt.Errorf("fork %s: %w", c.v.Spec.Name, err)
				}
				f.sink.Update(stageChildren, fmt.Sprintf("%d of %d run", up.Add(1), len(f.children)), -1)
				return nil
			})
		}
		return g.Wait()
	})
}

// goOnFrom brings a child up.
func (c *child) goOnFrom(ctx context.Context, memory string) error {
	driver, caps, err := c.check(ctx, c.v.Driver)
	if err != nil {
		return err
	}
	return c.operation.bringUp(ctx, driver, caps, origin{saved: memory, identity: true})
}

// takeBack erases all children, those that run already as well.
func (f *fork) takeBack(ctx context.Context) error {
	if len(f.children) == 0 {
		return nil
	}
	f.sink.Notice("taking back what was made")
	var errs []error
	for _, c := range f.children {
		errs = append(errs, c.erased(ctx))
	}
	return errors.Join(errs...)
}

func (f *fork) end() {
	for _, c := range f.children {
		c.end()
	}
}
