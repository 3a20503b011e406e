package builder

import (
	"context"
	"slices"
	"time"

	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/vm"
)

const (
	watchPause = 2 * time.Second // between two looks
	leastRoom  = 16 << 20        // bytes free that a build needs to be taken back
)

// watch ends ctx when the VM cannot go on: what waits for its answer would be told so by nobody, as a machine that is gone
// closes no connection, and one whose disk has no room stands still. stop has to be called with the error of what was
// done with ctx, and returns the reason in its place if there was one.
func (j *job) watch(ctx context.Context) (watched context.Context, stop func(error) error) {
	watched, cancel := context.WithCancelCause(ctx)
	go func() {
		tick := time.NewTicker(watchPause)
		defer tick.Stop()
		for {
			select {
			case <-watched.Done():
				return
			case <-tick.C:
			}
			if err := j.trouble(watched); err != nil {
				cancel(err)
				return
			}
		}
	}()
	return watched, func(err error) error {
		reason := context.Cause(watched)
		cancel(nil)
		if err == nil || ctx.Err() != nil || reason == nil {
			return err
		}
		return reason
	}
}

// over are the states from which a temporary VM does not come back by itself.
var over = []vm.State{vm.Failed, vm.Stopping, vm.Stopped, vm.Deleting}

const lookHint = "to look into it, build with --keep-failed"

// trouble says why the VM cannot go on, or nil.
func (j *job) trouble(ctx context.Context) error {
	state := j.b.o.Paths.State
	if free, err := disk.FreeBytes(state); err == nil && free < leastRoom {
		return fault.New(fault.Precondition, "disk full: %d MB are left in %s", free/1_000_000, state).WithHint("free some space there")
	}
	vms, err := j.b.o.Machines.List(ctx)
	if err != nil {
		return nil // whoever needs the store says so
	}
	i := slices.IndexFunc(vms, func(v vm.VM) bool { return v.Spec.Name == j.id })
	switch {
	case i < 0:
		return fault.New(fault.Precondition, "the temporary VM %s is gone: it ended, or somebody deleted it", j.id).WithHint("%s", lookHint)
	case slices.Contains(over, vms[i].State):
		text := "the temporary VM " + j.id + " is " + string(vms[i].State)
		if vms[i].Reason != "" {
			text += ": " + vms[i].Reason
		}
		return fault.New(fault.Precondition, "%s", text).WithHint("%s", lookHint)
	}
	return nil
}
