package engine

import (
	"context"
	"errors"
	"fmt"
	"time"

	"banger/internal/vm"
	"banger/internal/vmm"
)

// A guest that reboots more often than this is in a loop, and its VM fails.
const (
	maxReboots   = 5
	rebootWindow = time.Minute
)

// watch waits for the end of a machine that nobody of ours asked for.
func (e *Engine) watch(m *machine) {
	select {
	case <-m.taken:
		return
	case <-e.life.Done():
		return
	case <-m.running.Done():
	}
	ctx, o, err := e.begin(e.life, string(m.id), "exit", nil)
	if err != nil {
		if e.life.Err() == nil {
			e.log.Error("the end of a machine could not be handled", "id", m.id, "error", err)
		}
		return
	}
	defer o.end()
	if !e.takeIf(m) {
		return // a verb was quicker
	}
	if err := o.afterExit(ctx, m); err != nil {
		o.log.Error("after the end of the machine", "error", err)
	}
}

// takeIf takes the machine if it still is its VM's.
func (e *Engine) takeIf(m *machine) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.live[m.id] != m {
		return false
	}
	delete(e.live, m.id)
	return true
}

// afterExit brings the VM to where the end of its machine takes it.
func (o *operation) afterExit(ctx context.Context, m *machine) error {
	exit := m.running.Exit()
	o.log.Info("machine ended", "kind", exit.Kind, "detail", exit.Detail)
	tidy := m.stop(ctx) // it has ended: this removes its sockets
	way := map[vm.State]vm.Event{vm.Suspending: vm.SaveFailed, vm.Paused: vm.Copied}
	if back, ok := way[o.v.State]; ok { // the way back of a suspend or copy failed as well
		if _, err := o.move(back); err != nil {
			return errors.Join(tidy, err)
		}
	}
	again := exit.Kind == vmm.ExitReboot
	if again && !o.e.mayReboot(o.v.ID) {
		exit = vmm.Exit{Kind: vmm.ExitCrash, Detail: fmt.Sprintf("the guest rebooted more than %d times within %s", maxReboots, rebootWindow)}
		again = false
	}
	if exit.Kind != vmm.ExitPowerOff && !again {
		return errors.Join(tidy, o.died(ctx, string(exit.Kind)+": "+exit.Detail))
	}
	err := o.stage(ctx, stageRecord, func(context.Context) error {
		o.recorded = true
		_, err := o.move(vm.Exited)
		return err
	})
	if err == nil {
		err = o.finishStop(ctx, nil, true)
	}
	if err == nil && again {
		return errors.Join(tidy, o.start(ctx, vm.AskStart))
	}
	if err == nil {
		err = o.deleteEphemeral(ctx)
	}
	return errors.Join(tidy, err)
}

// died takes back what the capabilities made for a machine that ended badly. The row says so first.
func (o *operation) died(ctx context.Context, reason string) error {
	err := o.stage(ctx, stageRecord, func(context.Context) error {
		o.recorded = true
		o.v.Reason, o.v.Handle, o.v.StartedAt = clip(reason), nil, time.Time{}
		_, err := o.move(vm.Died)
		return err
	})
	if err != nil {
		return err
	}
	if err := o.capabilitiesDown(ctx); err != nil {
		return err // the row says failed already; the next start or stop takes back again
	}
	err = o.stage(ctx, stageDone, func(context.Context) error {
		_, err := o.move(vm.TakenDown)
		return err
	})
	if err != nil {
		return err
	}
	return o.deleteEphemeral(ctx)
}

// mayReboot counts a reboot and tells whether it is one too many.
func (e *Engine) mayReboot(id vm.ID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	now := e.c.Now()
	var recent []time.Time
	for _, t := range e.reboots[id] {
		if now.Sub(t) < rebootWindow {
			recent = append(recent, t)
		}
	}
	if len(recent) >= maxReboots {
		delete(e.reboots, id)
		return false
	}
	e.reboots[id] = append(recent, now)
	return true
}

// forget drops what is remembered of a VM that is gone.
func (e *Engine) forget(id vm.ID) {
	e.mu.Lock()
	defer e.mu.Unlock()
	delete(e.reboots, id)
}
