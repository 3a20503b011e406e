package engine

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"time"

	"banger/internal/capability"
	"banger/internal/fault"
	"banger/internal/progress"
	"banger/internal/store"
	"banger/internal/vm"
)

// The engine's own stages; capabilities are stages by their names.
const (
	stageCheck    = "check"    // everything that would make a start fail, before anything is touched
	stageRecord   = "record"   // the intent row
	stageBoot     = "boot"     // the VMM's process
	stageMachine  = "machine"  // for AfterStage only: the process runs and the row does not know it yet
	stageAgent    = "agent"    // until the agent's first answer
	stageLoad     = "load"     // the VMM's process, from saved memory
	stageIdentity = "identity" // a restored guest learns the time and who it is
	stageReady    = "ready"    // what capabilities do in the guest, and the row
	stageQuiesce  = "quiesce"  // the guest writes out what its programs wrote
	stagePause    = "pause"    // the guest stands still
	stageSave     = "save"     // its memory, and the row
	stageRelease  = "release"  // the process whose memory is saved
	stageShutdown = "shutdown" // the guest, the power button, the kill
	stageDone     = "done"     // the row after a take-down
	stageErase    = "erase"    // the VM's directory
	stageForget   = "forget"   // the VM's row
)

// Why a start, create or suspend under way is cancelled by another verb.
var (
	errStopAsked   = fault.New(fault.Conflict, "another request stopped the VM meanwhile")
	errDeleteAsked = fault.New(fault.Conflict, "another request deleted the VM meanwhile")
)

// rowTimeout bounds one write of a row that happens whatever became of the caller.
const rowTimeout = 15 * time.Second

// maxReason bounds the text of a failure in a row and in an event.
const maxReason = 1000

// operation is one verb at work on one VM, whose lock it holds. It belongs to one goroutine.
type operation struct {
	e    *Engine
	name string
	v    vm.VM // as it is, and as its row is since the last save
	sink progress.Sink
	log  *slog.Logger

	console  string        // where the guest's console can be read when all failed; empty: in the VM's directory
	failed   string        // the last stage that failed
	recorded bool          // the intent row is written: from now on each stage saves
	pending  []store.Event // not written yet
	closers  []func()
	cancel   context.CancelCauseFunc
}

// begin makes the caller the owner of a VM: it waits for the VM's lock and reads its row. The
// returned context ends with the caller's or with the engine.
func (e *Engine) begin(ctx context.Context, ref, name string, sink progress.Sink) (context.Context, *operation, error) {
	v, err := e.c.Store.Get(ctx, ref)
	if err != nil {
		return nil, nil, err
	}
	ctx, o, err := e.beginNew(ctx, v, name, sink)
	if err != nil {
		return nil, nil, err
	}
	if o.v, err = e.again(ctx, v); err != nil { // it may have changed while we waited
		o.end()
		return nil, nil, err
	}
	return ctx, o, nil
}

// beginNew is begin for a VM that has no row yet.
func (e *Engine) beginNew(ctx context.Context, v vm.VM, name string, sink progress.Sink) (context.Context, *operation, error) {
	if err := e.enter(); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(e.life, func() { cancel(errClosing) })
	o := &operation{
		e: e, name: name, v: v, sink: sink, log: e.log.With("vm", v.Spec.Name, "id", v.ID, "operation", name),
		closers: []func(){e.verbs.Done, func() { cancel(nil) }, func() { stop() }},
	}
	release, err := e.locks.acquire(ctx, v.ID)
	if err != nil {
		o.end()
		return nil, nil, interrupted(ctx, name, v, err)
	}
	o.closers = append(o.closers, release)
	o.cancel = cancel
	return ctx, o, nil
}

// end writes events that no row took along and gives the VM back.
func (o *operation) end() {
	if len(o.pending) > 0 {
		ctx, cancel := context.WithTimeout(context.Background(), rowTimeout)
		defer cancel()
		if err := o.e.c.Store.AddEvents(ctx, o.pending...); err != nil {
			o.log.Warn("events not written", "error", err)
		}
	}
	for i := len(o.closers) - 1; i >= 0; i-- {
		o.closers[i]()
	}
}

// move takes the VM to where an event takes it.
func (o *operation) move(event vm.Event) (vm.Act, error) {
	state, act, err := vm.Next(o.v.State, event)
	if err != nil {
		return act, err
	}
	if state != o.v.State {
		o.log.Info("state", "from", o.v.State, "to", state, "event", event)
	}
	o.v.State = state
	return act, nil
}

// stage runs one named step: told to the caller, timed, kept as an event, and saved with the row.
func (o *operation) stage(ctx context.Context, name string, f func(context.Context) error) error {
	begin := time.Now()
	err := o.sink.Run(name, func() error {
		err := context.Cause(ctx)
		if err == nil {
			err = f(ctx)
		}
		err = interrupted(ctx, o.name, o.v, err)
		if err != nil {
			o.failed = name
		}
		o.event(name, err, time.Since(begin))
		if err != nil || !o.recorded {
			return err
		}
		return o.save(ctx)
	})
	o.log.Debug("stage", "stage", name, "took", time.Since(begin), "error", err)
	o.hook(name)
	return err
}

func (o *operation) hook(stage string) {
	if o.e.c.AfterStage != nil {
		o.e.c.AfterStage(o.name, stage)
	}
}

func (o *operation) event(stage string, err error, took time.Duration) {
	ev := store.Event{VM: o.v.ID, Name: o.v.Spec.Name, At: o.e.c.Now(), Operation: o.name, Stage: stage, Duration: took}
	if err != nil {
		ev.Message = clip(err.Error())
	}
	o.pending = append(o.pending, ev)
}

// save writes the row and the pending events, whatever became of the caller.
func (o *operation) save(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), rowTimeout)
	defer cancel()
	if err := o.e.c.Store.Save(ctx, o.v, o.pending...); err != nil {
		return err
	}
	o.pending = nil
	return nil
}

// setNote remembers a capability's note; the map is copied because VMs that were handed out share it.
func (o *operation) setNote(name string, note capability.Note) {
	if note == nil {
		return
	}
	notes := maps.Clone(o.v.Notes)
	if notes == nil {
		notes = map[string]capability.Note{}
	}
	notes[name] = note
	o.v.Notes = notes
}

// wanted returns the capabilities of the VM, in order of start.
func (o *operation) wanted() []capability.Capability {
	var all []capability.Capability
	for _, c := range o.e.c.Capabilities {
		if c.Wants(o.v.Spec) {
			all = append(all, c)
		}
	}
	return all
}

// detached goes on when the caller is gone, and ends with the engine.
func (o *operation) detached(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	stop := context.AfterFunc(o.e.life, func() { cancel(errClosing) })
	return ctx, func() {
		stop()
		cancel(nil)
	}
}

// interrupted turns whatever failed after the end of ctx into the reason why ctx ended.
func interrupted(ctx context.Context, name string, v vm.VM, err error) error {
	cause := context.Cause(ctx)
	if err == nil || cause == nil {
		return err
	}
	var known *fault.Error
	switch {
	case errors.As(cause, &known):
		return known
	case errors.Is(cause, context.DeadlineExceeded):
		return fault.New(fault.Timeout, "%s of VM %s did not end in time", name, v.Spec.Name)
	}
	return fault.New(fault.Interrupted, "%s of VM %s was interrupted", name, v.Spec.Name)
}

func clip(s string) string {
	if len(s) <= maxReason {
		return s
	}
	return s[:maxReason] + "…"
}
