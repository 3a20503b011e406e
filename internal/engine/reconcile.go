package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"sync"

	"golang.org/x/sync/errgroup"

	"banger/internal/capability"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// reconcilers bounds how many VMs are looked at at once.
const reconcilers = 8

// Reconcile compares the rows with what is on this host, adopts machines that live, takes back the
// rest, and returns what it mended as sentences. It is called once, before the first verb. What
// could not be mended is in the error; the other VMs are usable all the same.
func (e *Engine) Reconcile(ctx context.Context) ([]string, error) {
	rows, err := e.c.Store.List(ctx)
	if err != nil {
		return nil, err
	}
	var mu sync.Mutex
	var told []string
	var errs []error
	tell := func(err error, sentences ...string) {
		mu.Lock()
		defer mu.Unlock()
		for _, s := range sentences {
			if s != "" {
				told = append(told, s)
			}
		}
		errs = append(errs, err)
	}
	restarted, err := e.hostRestarted(ctx)
	tell(err)
	var g errgroup.Group
	g.SetLimit(reconcilers)
	for _, v := range rows {
		g.Go(func() error {
			sentence, err := e.reconcileOne(ctx, v.ID, restarted)
			tell(err, sentence)
			return nil
		})
	}
	_ = g.Wait()                     // its functions keep their errors themselves
	if errors.Join(errs...) == nil { // else the next reconcile must know it as well
		errs = append(errs, e.rememberHostBoot(ctx))
	}
	sort.Strings(told)
	if rows, err = e.c.Store.List(ctx); err != nil {
		return told, errors.Join(append(errs, err)...)
	}
	sentences, err := e.reconcileTemplates(ctx)
	tell(err, sentences...)
	for _, c := range e.c.Capabilities {
		if s, ok := c.(capability.Sweeper); ok {
			sentences, err := s.Sweep(ctx, rows)
			tell(err, sentences...)
		}
	}
	sentences, err = e.sweepDirectories(ctx)
	tell(err, sentences...)
	for _, s := range told {
		e.log.Info("reconciled", "mended", s)
	}
	return told, errors.Join(errs...)
}

// metaHostBoot is the key of the host's last known start.
const metaHostBoot = "host_boot"

// hostRestarted tells whether the host was started anew since the last reconcile that got through.
func (e *Engine) hostRestarted(ctx context.Context) (bool, error) {
	before, err := e.c.Store.Meta(ctx, metaHostBoot)
	if err != nil || e.c.HostBoot == "" || before == e.c.HostBoot {
		return false, err
	}
	return before != "", nil
}

func (e *Engine) rememberHostBoot(ctx context.Context) error {
	if e.c.HostBoot == "" {
		return nil
	}
	return e.c.Store.SetMeta(ctx, metaHostBoot, e.c.HostBoot)
}

func (e *Engine) reconcileOne(ctx context.Context, id vm.ID, restarted bool) (string, error) {
	ctx, o, err := e.begin(ctx, string(id), "reconcile", nil)
	if err != nil {
		return "", err
	}
	if err := o.sweepCopies(); err != nil {
		o.end()
		return "", err
	}
	if o.v.State == vm.Stopping {
		return o.resumeStop(ctx)
	}
	defer o.end()
	if o.v.State == vm.Running {
		return o.reattach(ctx, restarted)
	}
	sentence, err := o.mend(ctx)
	// One that ran and was to be deleted when it stops: a daemon died in between.
	if over := o.v.State == vm.Stopped || o.v.State == vm.Failed; err == nil && over && o.v.Spec.Ephemeral && o.v.Driver != "" {
		return fmt.Sprintf("VM %s was to be deleted with its end: it is gone", o.v.Spec.Name), o.deleteEphemeral(ctx)
	}
	return sentence, err
}

// reattach adopts the machine of a VM whose row says that it runs. One that ran when the host went down
// is stopped: nothing is wrong with it.
func (o *operation) reattach(ctx context.Context, restarted bool) (string, error) {
	m, err := o.adoptLeftover(ctx)
	if err != nil {
		return "", err
	}
	if m == nil {
		return o.endedUnwatched(ctx, restarted)
	}
	return "", errors.Join(o.takeUp(ctx, m), o.dropMemory()) // of a resume that was done but for this
}

// takeUp makes a machine that an earlier daemon started the VM's.
func (o *operation) takeUp(ctx context.Context, m *machine) error {
	o.e.adoptMachine(m)
	var errs []error
	for _, c := range o.wanted() {
		if r, ok := c.(capability.Reattacher); ok {
			if err := r.Reattach(ctx, o.v); err != nil {
				errs = append(errs, fmt.Errorf("take up %s of VM %s again: %w", c.Name(), o.v.Spec.Name, err))
			}
		}
	}
	return errors.Join(errs...)
}

// endedUnwatched brings a VM whose machine is gone to where its end takes it.
func (o *operation) endedUnwatched(ctx context.Context, restarted bool) (string, error) {
	name, how := o.v.Spec.Name, "its VMM ended while no daemon watched it"
	exit := o.lastExit()
	orderly := map[vmm.ExitKind]string{
		vmm.ExitPowerOff: "powered itself off while no daemon watched it", vmm.ExitReboot: "rebooted while no daemon watched it",
	}[exit.Kind]
	switch {
	case restarted:
		orderly = "ran when the host went down"
	case exit.Kind == vmm.ExitPanic:
		how += ": panic: " + exit.Detail
	}
	end := func() error { return o.died(ctx, how) }
	sentence := fmt.Sprintf("VM %s has failed: %s", name, how)
	if orderly != "" {
		end = func() error { return o.stop(ctx, true) }
		sentence = fmt.Sprintf("VM %s %s: it is stopped", name, orderly)
	}
	if err := end(); err != nil {
		return "", err
	}
	if o.v.State == vm.Gone {
		return fmt.Sprintf("VM %s was to live as long as its VMM: it is gone", name), nil
	}
	return sentence, nil
}

// resumeStop finishes a stop that an earlier daemon began. A guest that still runs is given its time,
// in the background; until that is done the VM is owned.
func (o *operation) resumeStop(ctx context.Context) (string, error) {
	m, err := o.adoptLeftover(ctx)
	if err != nil || m == nil {
		defer o.end()
		if err != nil {
			return "", err
		}
		return o.mend(ctx)
	}
	ctx, cancel := o.detached(ctx)
	go func() { // o is counted as a verb until end
		defer o.end()
		defer cancel()
		err := o.finishStop(ctx, m, false)
		if err == nil {
			err = o.deleteEphemeral(ctx)
		}
		if err != nil && o.e.life.Err() == nil {
			o.log.Error("finish a stop", "error", err)
		}
	}()
	return fmt.Sprintf("VM %s was being stopped: the stop goes on", o.v.Spec.Name), nil
}

// mend finishes or takes back what nobody works on any more: the caller owns the VM, so a state
// that is passed through was left by a daemon that died or by a verb that failed half way.
func (o *operation) mend(ctx context.Context) (string, error) {
	ctx, cancel := o.detached(ctx)
	defer cancel()
	name := o.v.Spec.Name
	switch o.v.State {
	case vm.Starting:
		return o.mendStart(ctx)
	case vm.Resuming:
		return o.mendResume(ctx)
	case vm.Suspending:
		return o.mendSuspend(ctx)
	case vm.Suspended:
		return o.mendSuspended(ctx)
	case vm.Paused:
		return o.mendPaused(ctx)
	case vm.Reverting:
		return o.mendRevert(ctx)
	case vm.Stopping:
		if err := o.killLeftover(ctx); err != nil {
			return "", err
		}
		if err := o.finishStop(ctx, nil, true); err != nil {
			return "", err
		}
		return fmt.Sprintf("VM %s was being stopped: the stop is done", name), o.deleteEphemeral(ctx)
	case vm.Deleting:
		o.recorded = true
		if err := o.finishErase(ctx); err != nil {
			return "", err
		}
		return fmt.Sprintf("VM %s was being deleted: it is gone", name), nil
	case vm.Running:
		if o.e.holds(o.v.ID) {
			return "", nil
		}
		return o.reattach(ctx, false) // what became of its machine could not be found out or written before
	case vm.Failed, vm.Stopped:
		if err := o.dropMemory(); err != nil { // the row says first that there is none
			return "", err
		}
		if o.v.Handle == nil {
			return "", nil
		}
		o.recorded = true
		if err := o.killLeftover(ctx); err != nil {
			return "", err
		}
		return fmt.Sprintf("VM %s still had a process: ended", name), o.save(ctx)
	}
	return "", nil
}

// mendStart takes back a start or resume that nobody works on any more.
func (o *operation) mendStart(ctx context.Context) (string, error) {
	name, doing := o.v.Spec.Name, "started"
	if o.v.State == vm.Resuming {
		doing = "resumed"
	}
	o.recorded = true
	if o.v.Creating {
		if _, err := o.move(vm.BootFailed); err != nil {
			return "", err
		}
		return fmt.Sprintf("VM %s was being created: taken back", name), o.erase(ctx)
	}
	if err := o.killLeftover(ctx); err != nil {
		return "", err
	}
	if err := o.capabilitiesDown(ctx); err != nil {
		return "", err
	}
	if err := removeUnfinished(o.e.c.Paths.VM(o.v.ID)); err != nil {
		return "", err
	}
	if o.v.State == vm.Starting {
		if err := o.dropMemory(); err != nil {
			return "", err
		}
	}
	err := o.stage(ctx, stageDone, func(context.Context) error {
		o.v.Reason = "the daemon ended while it was being " + doing
		_, err := o.move(vm.BootFailed)
		return err
	})
	return fmt.Sprintf("VM %s was being %s: taken back", name, doing), err
}

// sweepDirectories removes directories below the VMs' that belong to no row. One that holds a disk is
// kept and told: only a lost database can have left it, and it may hold somebody's work.
func (e *Engine) sweepDirectories(ctx context.Context) ([]string, error) {
	entries, err := os.ReadDir(e.c.Paths.VMs())
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var told []string
	var errs []error
	for _, entry := range entries {
		if !vm.IsID(entry.Name()) {
			continue
		}
		if _, err := e.c.Store.Get(ctx, entry.Name()); fault.KindOf(err) != fault.NotFound {
			errs = append(errs, err)
			continue
		}
		dir := filepath.Join(e.c.Paths.VMs(), entry.Name())
		if holdsDisk(dir) {
			told = append(told, fmt.Sprintf("directory %s belongs to no VM and holds disks: it was left there", dir))
			continue
		}
		errs = append(errs, os.RemoveAll(dir))
		told = append(told, fmt.Sprintf("directory %s belonged to no VM: removed", dir))
	}
	return told, errors.Join(errs...)
}

// removeUnfinished removes from a VM's directory what somebody was writing when the daemon died: such
// files have names with a dot in front until they are whole.
func removeUnfinished(dir string) error {
	names, err := filepath.Glob(filepath.Join(dir, ".*"))
	if err != nil {
		return err
	}
	for _, name := range names {
		err = errors.Join(err, os.Remove(name))
	}
	return err
}

func holdsDisk(dir string) bool {
	for _, name := range []string{paths.OverlayDisk, paths.WorkDisk, paths.Snapshots} {
		if _, err := os.Lstat(filepath.Join(dir, name)); err == nil {
			return true
		}
	}
	return false
}
