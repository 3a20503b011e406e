package engine

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/capability"
	"banger/internal/fault"
	"banger/internal/undo"
	"banger/internal/vm"
)

const (
	askTimeout    = 15 * time.Second // for the agent to take the request, on a host that is busy
	lostAnswer    = time.Second      // for a machine to end whose agent's or monitor's answer was lost, as may be when it ends
	buttonTimeout = 10 * time.Second // for the guest to end after the power button
	eraseTimeout  = time.Minute
)

// stop takes down a VM in whatever state it is.
func (o *operation) stop(ctx context.Context, force bool) error {
	_, act, err := vm.Next(o.v.State, vm.AskStop)
	if err != nil || act == vm.Nothing {
		return err
	}
	if !o.v.State.HasProcess() {
		return o.clear(ctx)
	}
	if err := o.takeDown(ctx, force); err != nil {
		return err
	}
	return o.deleteEphemeral(ctx)
}

// takeDown ends a running machine and takes back what its capabilities made. Once begun it goes on
// without its caller; what it does not get done is finished by the next verb or reconcile.
func (o *operation) takeDown(ctx context.Context, force bool) error {
	ctx, cancel := o.detached(ctx)
	defer cancel()
	err := o.stage(ctx, stageRecord, func(context.Context) error {
		o.recorded = true
		_, err := o.move(vm.AskStop)
		return err
	})
	if err != nil {
		return err
	}
	m := o.e.takeMachine(o.v.ID)
	if m == nil { // nobody could take it up when the daemon started
		if m, err = o.adoptLeftover(ctx); err != nil {
			return o.notDown(ctx, err)
		}
	}
	return o.finishStop(ctx, m, force)
}

// finishStop goes from the intent row of a stop to its end; m may be nil when no machine is left.
func (o *operation) finishStop(ctx context.Context, m *machine, force bool) error {
	o.recorded = true
	err := o.stage(ctx, stageShutdown, func(ctx context.Context) error {
		if m != nil {
			if err := o.shutdown(ctx, m, force); err != nil {
				return err
			}
		}
		o.v.Handle = nil
		return nil
	})
	if err != nil {
		if m != nil {
			err = errors.Join(err, m.letGo())
		}
		return o.notDown(ctx, err)
	}
	if err := o.capabilitiesDown(ctx); err != nil {
		return o.notDown(ctx, err)
	}
	return o.stage(ctx, stageDone, func(context.Context) error {
		o.v.StartedAt, o.v.Reason = time.Time{}, ""
		_, err := o.move(vm.TakenDown)
		return err
	})
}

// notDown keeps the intent in the row, so that the take-down is tried again.
func (o *operation) notDown(ctx context.Context, err error) error {
	if fault.KindOf(err) != fault.Interrupted {
		o.v.Reason = clip(err.Error())
	}
	return errors.Join(err, o.save(ctx))
}

// clear takes back what a VM without a machine may still hold; a failed one becomes a stopped one.
func (o *operation) clear(ctx context.Context) error {
	ctx, cancel := o.detached(ctx)
	defer cancel()
	o.recorded = true
	if o.v.State == vm.Suspended {
		o.sink.Notice(memoryDropped(o.v.Spec.Name))
	}
	if err := o.killLeftover(ctx); err != nil {
		return err
	}
	if err := o.capabilitiesDown(ctx); err != nil {
		return err
	}
	err := o.stage(ctx, stageDone, func(context.Context) error {
		o.v.StartedAt, o.v.Reason, o.v.Handle = time.Time{}, "", nil
		_, err := o.move(vm.AskStop)
		return err
	})
	if err != nil {
		return err
	}
	return o.dropMemory() // not before the row says that there is none
}

// shutdown ends a machine: by the agent, by the power button, by force.
func (o *operation) shutdown(ctx context.Context, m *machine, force bool) error {
	if !force && !o.askGuest(ctx, m) && !o.pressButton(ctx, m) && ctx.Err() == nil {
		o.sink.Update(stageShutdown, "the guest did not shut down in time: killing it", -1)
		o.log.Warn("guest did not shut down in time, killing it")
	}
	if ctx.Err() != nil { // the daemon ends: the machine runs on, its row says what is to be done
		return context.Cause(ctx)
	}
	return m.stop(ctx)
}

// askGuest asks the agent for a power-off and tells whether the machine ended.
func (o *operation) askGuest(ctx context.Context, m *machine) bool {
	asking, cancel := context.WithTimeout(ctx, askTimeout)
	defer cancel()
	_, err := m.agent.Shutdown(asking, &agentv1.ShutdownRequest{Mode: agentv1.ShutdownRequest_MODE_POWEROFF})
	if err != nil && !m.endsWithin(ctx, lostAnswer) {
		o.sink.Update(stageShutdown, "the agent does not answer: pressing the power button", -1)
		o.log.Warn("agent did not take the shutdown", "error", err)
		return false
	}
	return m.endsWithin(ctx, o.e.c.StopTimeout)
}

func (o *operation) pressButton(ctx context.Context, m *machine) bool {
	if err := m.running.PowerButton(ctx); err != nil {
		o.log.Debug("no power button", "error", err)
		return m.ended()
	}
	return m.endsWithin(ctx, buttonTimeout)
}

// capabilitiesDown takes back, in reverse, what does not outlive a stop. A failure does not keep the
// others from it.
func (o *operation) capabilitiesDown(ctx context.Context) error {
	wanted := o.wanted()
	var errs []error
	for i := len(wanted) - 1; i >= 0; i-- {
		c := wanted[i]
		errs = append(errs, o.stage(ctx, c.Name(), func(ctx context.Context) error {
			ctx, cancel := context.WithTimeout(ctx, undo.StepTimeout)
			defer cancel()
			if err := c.Down(ctx, o.v); err != nil {
				return fmt.Errorf("take back %s of VM %s: %w", c.Name(), o.v.Spec.Name, err)
			}
			return nil
		}))
	}
	return errors.Join(errs...)
}

// delete removes the VM; a running one only with force.
func (o *operation) delete(ctx context.Context, force bool) error {
	if force && o.v.State.HasProcess() {
		if err := o.takeDown(ctx, true); err != nil {
			return err
		}
	}
	ctx, cancel := o.detached(ctx)
	defer cancel()
	return o.erase(ctx)
}

// deleteEphemeral deletes a VM that is to live no longer than its machine.
func (o *operation) deleteEphemeral(ctx context.Context) error {
	if !o.v.Spec.Ephemeral {
		return nil
	}
	ctx, cancel := o.detached(ctx)
	defer cancel()
	return o.erase(ctx)
}

// erase writes the intent row and removes everything, the row last.
func (o *operation) erase(ctx context.Context) error {
	err := o.stage(ctx, stageRecord, func(context.Context) error {
		o.recorded = true
		_, err := o.move(vm.AskDelete)
		return err
	})
	if err != nil {
		return err
	}
	return o.finishErase(ctx)
}

// finishErase goes from the intent row of a delete to its end.
func (o *operation) finishErase(ctx context.Context) error {
	if err := o.killLeftover(ctx); err != nil {
		return o.notDown(ctx, err)
	}
	if err := o.capabilitiesDown(ctx); err != nil {
		return o.notDown(ctx, err)
	}
	if err := o.stage(ctx, stageErase, o.eraseFiles); err != nil {
		return o.notDown(ctx, err)
	}
	o.recorded = false // there is no row to save any more
	err := o.stage(ctx, stageForget, func(ctx context.Context) error {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rowTimeout)
		defer cancel()
		if err := o.e.c.Store.Delete(ctx, o.v.ID, o.pending...); err != nil {
			return err
		}
		o.pending = nil
		o.e.forget(o.v.ID)
		_, err := o.move(vm.Erased)
		return err
	})
	return err
}

func (o *operation) eraseFiles(ctx context.Context) error {
	wanted := o.wanted()
	for i := len(wanted) - 1; i >= 0; i-- {
		if c, ok := wanted[i].(capability.Eraser); ok {
			if err := c.Erase(ctx, o.v); err != nil {
				return fmt.Errorf("erase %s of VM %s: %w", wanted[i].Name(), o.v.Spec.Name, err)
			}
		}
	}
	if err := os.RemoveAll(filepath.Clean(o.e.c.Paths.VM(o.v.ID))); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot remove the directory of VM %s", o.v.Spec.Name)
	}
	return nil
}
