package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"connectrpc.com/connect"

	agentv1 "banger/api/agent/v1"
	"banger/internal/capability"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/vm"
	"banger/internal/vmm"
)

const (
	pauseTimeout = 40 * time.Second // for the VMM to halt a guest, which flushes its disks, or to let it go on; it gives up before
	saveTimeout  = 10 * time.Minute // for large memories on slow disks

	// saveMargin is what saved memory may take beyond the memory itself: the devices.
	saveMargin = 64 << 20

	maxLacking = 4 // of a guest's sentences that are passed on
)

// A guest's life is in the hands of its VMM while it is suspended.
type saveable interface {
	vmm.Pauser
	vmm.Saver
}

// suspend saves the memory of a running VM and ends its process. Until the memory is saved nothing is
// lost: the guest runs on when something fails, and its watcher keeps the machine all the while.
func (o *operation) suspend(ctx context.Context) error {
	_, act, err := vm.Next(o.v.State, vm.AskSuspend)
	if err != nil {
		return fault.Wrap(fault.KindOf(err), err, "VM %s is not suspended", o.v.Spec.Name)
	}
	if act == vm.Nothing {
		return nil
	}
	o.e.locks.interruptible(o.v.ID, o.cancel)
	var m *machine
	var guest saveable
	err = o.stage(ctx, stageCheck, func(context.Context) error {
		m, guest, err = o.checkSuspend()
		return err
	})
	if err != nil {
		return err
	}
	err = o.stage(ctx, stageRecord, func(context.Context) error {
		o.recorded = true
		_, err := o.move(vm.AskSuspend)
		return err
	})
	if err == nil {
		err = o.saveMemory(ctx, m, guest)
	}
	if err != nil {
		if o.v.State == vm.Suspended { // its row could not be written
			o.v.State = vm.Suspending
		}
		return errors.Join(err, o.goOn(ctx, m))
	}
	o.e.locks.interruptible(o.v.ID, nil)
	return o.release(ctx, m)
}

// checkSuspend finds what would keep a running VM from being suspended.
func (o *operation) checkSuspend() (*machine, saveable, error) {
	name := o.v.Spec.Name
	if o.v.Spec.Ephemeral {
		return nil, nil, fault.New(fault.Conflict, "VM %s is not suspended: it was made to be deleted when its machine ends", name)
	}
	m, guest, err := o.checkSaveable()
	if err != nil {
		return nil, nil, err
	}
	dir := o.e.c.Paths.VM(o.v.ID)
	return m, guest, disk.RequireFree(dir, o.v.Spec.MemoryBytes+saveMargin, "the memory of VM "+name)
}

// saveMemory goes from the intent row to the row that says suspended.
func (o *operation) saveMemory(ctx context.Context, m *machine, guest saveable) error {
	err := o.stage(ctx, stageQuiesce, func(ctx context.Context) error {
		_, err := o.quiesce(ctx, m, false)
		return err
	})
	if err != nil {
		return err
	}
	err = o.stage(ctx, stagePause, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, pauseTimeout)
		defer cancel()
		return guest.Pause(ctx)
	})
	if err != nil {
		return err
	}
	return o.stage(ctx, stageSave, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(ctx, saveTimeout)
		defer cancel()
		if err := o.dropMemory(); err != nil {
			return err
		}
		if err := os.Mkdir(o.newMemoryDir(), 0o700); err != nil {
			return fault.Wrap(fault.Precondition, err, "cannot save the memory of VM %s", o.v.Spec.Name)
		}
		if err := guest.Save(ctx, o.newMemoryDir()); err != nil {
			return err
		}
		if err := o.keepMemory(); err != nil {
			return err
		}
		o.v.StartedAt, o.v.Reason = time.Time{}, ""
		_, err := o.move(vm.Saved)
		return err
	})
}

// quiesce asks the guest to write out what its programs wrote, and to hold them until it is adopted: it tells for how long
// they have stood still. The memory of a guest that does not is not saved.
func (o *operation) quiesce(ctx context.Context, m *machine, hold bool) (held time.Duration, err error) {
	asking, cancel := context.WithTimeout(ctx, o.e.c.QuiesceTimeout)
	defer cancel()
	response, err := m.agent.Quiesce(asking, &agentv1.QuiesceRequest{Hold: hold})
	if err == nil {
		for _, what := range response.GetLacking()[:min(len(response.GetLacking()), maxLacking)] {
			o.sink.Notice(fmt.Sprintf("VM %s: %s", o.v.Spec.Name, clip(fault.Printable(what))))
		}
		return min(max(0, time.Duration(response.GetHeldNanos())), o.e.c.QuiesceTimeout), nil // what a guest says may be nonsense
	}
	return 0, o.notQuiesced(ctx, asking, m, err)
}

// notQuiesced says why a guest did not write out its data.
func (o *operation) notQuiesced(ctx, asking context.Context, m *machine, err error) error {
	switch {
	case m.ended(), broke(err) && m.endsWithin(ctx, lostAnswer): // the channel breaks before the end is known
		return fault.New(fault.Conflict, "VM %s ended before its memory was saved", o.v.Spec.Name)
	case ctx.Err() == nil && (asking.Err() != nil || connect.CodeOf(err) == connect.CodeDeadlineExceeded):
		var said error // which of its parts took too long, unless the agent does not answer at all
		if answer := new(connect.Error); errors.As(err, &answer) && answer.Message() != context.DeadlineExceeded.Error() {
			said = errors.New(clip(fault.Printable(answer.Message())))
		}
		return fault.Wrap(fault.Timeout, said, "the guest of VM %s runs on: it did not write out its data within %s", o.v.Spec.Name, o.e.c.QuiesceTimeout).
			WithHint("see what keeps it: banger vm exec %s -- ps aux", o.v.Spec.Name)
	case connect.CodeOf(err) == connect.CodeUnimplemented:
		return fault.New(fault.Precondition, "the agent of VM %s is of an earlier version, which cannot be saved with its memory: it runs on", o.v.Spec.Name).
			WithHint("restart it once: banger vm restart %s", o.v.Spec.Name)
	}
	return fault.Wrap(fault.Unexpected, err, "the guest of VM %s could not write out its data: it runs on", o.v.Spec.Name)
}

// goOn goes from suspending back to running: saved memory is dropped and the guest goes on. One that has
// ended meanwhile counts as running, too, until its watcher comes.
func (o *operation) goOn(ctx context.Context, m *machine) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), pauseTimeout)
	defer cancel()
	left := o.dropMemory()
	guest, ok := m.running.(vmm.Pauser)
	if !ok {
		return errors.Join(left, fault.New(fault.Precondition, "%s cannot let VM %s go on", o.v.Driver, o.v.Spec.Name))
	}
	if err := guest.Resume(ctx); err != nil && !m.endsWithin(ctx, lostAnswer) {
		return errors.Join(left, fmt.Errorf("let VM %s go on: %w", o.v.Spec.Name, err))
	}
	if stood := o.failed != stageRecord && o.failed != stageQuiesce; stood && !m.ended() {
		o.setClock(ctx, m)
	}
	_, err := o.move(vm.SaveFailed)
	return errors.Join(left, err, o.save(ctx))
}

// release ends the process of a VM whose memory is saved, and takes back what its capabilities made. It
// goes on without its caller; what it does not get done is finished by the next verb or reconcile.
func (o *operation) release(ctx context.Context, m *machine) error {
	ctx, cancel := o.detached(ctx)
	defer cancel()
	if held := o.e.takeMachine(o.v.ID); held != nil {
		m = held
	}
	if err := o.stage(ctx, stageRelease, m.stop); err != nil {
		return o.notDown(ctx, errors.Join(err, m.letGo()))
	}
	return o.finishRelease(ctx)
}

func (o *operation) finishRelease(ctx context.Context) error {
	if err := o.capabilitiesDown(ctx); err != nil {
		return o.notDown(ctx, err)
	}
	return o.stage(ctx, stageDone, func(context.Context) error {
		o.v.Handle = nil // it was kept as a sign that something is left to do
		_, err := o.move(vm.TakenDown)
		return err
	})
}

// resume restores a suspended VM; state is the intent. On failure it is suspended as before.
func (o *operation) resume(ctx context.Context, state vm.State) error {
	before := o.v.State
	o.e.locks.interruptible(o.v.ID, o.cancel)
	driver, caps, err := o.check(ctx, o.v.Driver)
	if err == nil {
		err = o.checkMemory()
	}
	if err != nil {
		return o.notResumed(err)
	}
	err = o.stage(ctx, stageRecord, func(context.Context) error {
		o.v.State, o.recorded = state, true
		return nil
	})
	if err != nil {
		o.v.State = before
		return err
	}
	if err := o.bringUp(ctx, driver, caps, origin{saved: o.memoryDir()}); err != nil {
		return o.giveUpResume(ctx, err)
	}
	if err := o.dropMemory(); err != nil { // not before the row says that it runs
		o.sink.Notice(err.Error())
	}
	return nil
}

// giveUpResume writes the row after a resume that failed and was taken back.
func (o *operation) giveUpResume(ctx context.Context, cause error) error {
	o.sink.Notice("taking back what was made")
	o.sink = nil
	o.v.Handle, o.v.StartedAt, o.v.Reason = nil, time.Time{}, ""
	if !errors.Is(cause, errStopAsked) && fault.KindOf(cause) != fault.Interrupted {
		o.v.Reason = clip(cause.Error())
	}
	_, err := o.move(vm.BootFailed)
	return errors.Join(o.notResumed(cause), err, o.save(ctx))
}

// notResumed tells the way out of a resume that cannot be done.
func (o *operation) notResumed(cause error) error {
	if fault.KindOf(cause) == fault.Interrupted {
		return cause
	}
	name := o.v.Spec.Name
	out := "boot it anew, without its memory and with its disks: banger vm start " + name + " --cold"
	if hint := fault.HintOf(cause); hint != "" {
		out = hint + "; or " + out
	}
	return fault.Wrap(fault.KindOf(cause), cause, "VM %s is not resumed", name).WithHint("%s", out)
}

// mendSuspend finishes or takes back a suspend that nobody works on any more: a guest that is there goes
// on, else the memory counts when it is whole.
func (o *operation) mendSuspend(ctx context.Context) (string, error) {
	name := o.v.Spec.Name
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
		return o.mendSaved(ctx)
	}
	if err := o.goOn(ctx, m); err != nil {
		return "", errors.Join(err, o.endStuck(ctx, m))
	}
	sentence := fmt.Sprintf("VM %s was being suspended: it runs on", name)
	if held {
		return sentence, nil
	}
	return sentence, o.takeUp(ctx, m)
}

// mendSaved is for a VM that was being suspended and whose machine is gone.
func (o *operation) mendSaved(ctx context.Context) (string, error) {
	name := o.v.Spec.Name
	if o.hasMemory() {
		o.v.StartedAt = time.Time{}
		if _, err := o.move(vm.Saved); err != nil {
			return "", err
		}
		return fmt.Sprintf("VM %s was being suspended: it is suspended", name), errors.Join(o.save(ctx), o.finishRelease(ctx))
	}
	const reason = "its VMM ended while it was being suspended"
	return fmt.Sprintf("VM %s has failed: %s", name, reason), errors.Join(o.died(ctx, reason), o.dropMemory())
}

// endStuck ends a machine whose guest could not be let go on, unless only our time was over.
func (o *operation) endStuck(ctx context.Context, m *machine) error {
	if o.v.State != vm.Suspending || ctx.Err() != nil {
		return nil
	}
	if held := o.e.takeMachine(o.v.ID); held != nil {
		m = held
	}
	if err := m.stop(ctx); err != nil {
		return err
	}
	return o.died(ctx, "its VMM could not let it go on after a suspend that failed")
}

// mendSuspended ends what a suspended VM still has of the time when it ran.
func (o *operation) mendSuspended(ctx context.Context) (string, error) {
	if o.v.Handle == nil {
		return "", nil
	}
	o.recorded = true
	m, err := o.adoptLeftover(ctx)
	if err != nil {
		return "", err
	}
	if m != nil {
		if err := m.stop(ctx); err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("VM %s was being suspended: it is suspended", o.v.Spec.Name), o.finishRelease(ctx)
}

// mendResume finishes a resume that nobody works on any more, or takes it back. A guest that was loaded may
// have written to its disks already: its memory is of no use any more, so it is given its chance.
func (o *operation) mendResume(ctx context.Context) (string, error) {
	m, err := o.adoptLeftover(ctx)
	if err != nil {
		return "", err
	}
	if m == nil {
		return o.mendStart(ctx)
	}
	o.recorded = true
	if err := o.finishResume(ctx, m); err != nil {
		if ctx.Err() != nil { // the daemon ends: the next one tries again
			return "", errors.Join(err, m.letGo())
		}
		o.log.Warn("a machine that was left over does not go on", "error", err)
		if err := m.stop(ctx); err != nil {
			return "", err
		}
		return o.mendStart(ctx)
	}
	return fmt.Sprintf("VM %s was being resumed: it runs", o.v.Spec.Name), errors.Join(o.takeUp(ctx, m), o.dropMemory())
}

func (o *operation) finishResume(ctx context.Context, m *machine) error {
	if guest, ok := m.running.(vmm.Pauser); ok {
		if err := guest.Resume(ctx); err != nil {
			return err
		}
	}
	if err := o.remember(m.running); err != nil {
		return err
	}
	from := origin{saved: o.memoryDir()}
	if err := o.awaitGuest(ctx, m, &capability.Build{}, from); err != nil {
		return err
	}
	return o.ready(ctx, m, from)
}
