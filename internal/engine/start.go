package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/capability"
	"banger/internal/fault"
	"banger/internal/undo"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// pingPause is between two questions to an agent that broke off an answer.
const pingPause = 100 * time.Millisecond

// create records the VM and brings it up; on failure nothing is left.
func (o *operation) create(ctx context.Context, start bool) error {
	o.e.locks.interruptible(o.v.ID, o.cancel)
	if _, err := o.e.c.Store.Get(ctx, o.v.Spec.Name); err == nil {
		return fault.New(fault.Conflict, "a VM named %s exists", o.v.Spec.Name).
			WithHint("choose another name, or delete it: banger vm delete %s", o.v.Spec.Name)
	}
	driver, caps, err := o.check(ctx, o.v.Spec.VMM)
	if err != nil {
		return err
	}
	err = o.stage(ctx, stageRecord, func(ctx context.Context) error {
		if start {
			o.v.Driver = driver.Name()
			if _, err := o.move(vm.AskStart); err != nil {
				return err
			}
			o.v.Creating = true
		}
		v, err := o.e.c.Store.Insert(ctx, o.v, o.e.c.Allocate, o.pending...)
		if err != nil {
			return err
		}
		o.v, o.pending, o.recorded = v, nil, true
		return nil
	})
	if err != nil && o.recorded {
		return errors.Join(err, o.eraseFailed(ctx))
	}
	if err != nil || !start {
		return err
	}
	if err := o.bringUpNew(ctx, driver, caps); err != nil {
		return o.giveUp(ctx, err)
	}
	return nil
}

// start brings up a VM that has a row: it boots, unless what was asked restores it.
func (o *operation) start(ctx context.Context, ask vm.Event) error {
	before := o.v.State
	state, act, err := vm.Next(before, ask)
	switch {
	case err != nil:
		done := "started"
		if ask == vm.AskResume {
			done = "resumed"
		}
		return fault.Wrap(fault.KindOf(err), err, "VM %s is not %s", o.v.Spec.Name, done)
	case act == vm.Nothing:
		return nil
	case act == vm.Restore:
		return o.resume(ctx, state)
	}
	o.e.locks.interruptible(o.v.ID, o.cancel)
	driver, caps, err := o.check(ctx, o.v.Spec.VMM)
	if err != nil {
		return err
	}
	err = o.stage(ctx, stageRecord, func(context.Context) error {
		o.v.State, o.v.Reason, o.v.Driver, o.recorded = state, "", driver.Name(), true
		return nil
	})
	if err != nil {
		o.v.State = before
		return err
	}
	if before == vm.Suspended {
		o.sink.Notice(memoryDropped(o.v.Spec.Name))
	}
	err = o.dropMemory() // it would not fit to the disks once this boot has written to them
	if err == nil {
		err = o.bringUp(ctx, driver, caps, origin{})
	}
	if err != nil {
		return o.giveUp(ctx, err)
	}
	return nil
}

// setVMM changes which VMM the next start asks for.
func (o *operation) setVMM(ctx context.Context, name string) error {
	spec := o.v.Spec
	spec.VMM = name
	if err := spec.Validate(o.e.c.Limits); err != nil || spec.VMM == o.v.Spec.VMM {
		return err
	}
	if o.v.State != vm.Stopped && o.v.State != vm.Failed {
		return fault.New(fault.Conflict, "VM %s is %s: its VMM is chosen while it is stopped", spec.Name, o.v.State).
			WithHint("stop it first: banger vm stop %s", spec.Name)
	}
	o.v.Spec = spec
	return o.save(ctx)
}

// check finds what would make the start under a VMM fail; it touches nothing.
func (o *operation) check(ctx context.Context, name string) (driver vmm.Driver, caps vmm.Caps, err error) {
	err = o.stage(ctx, stageCheck, func(ctx context.Context) error {
		if err := o.v.Spec.Validate(o.e.c.Limits); err != nil {
			return err
		}
		if driver, caps, err = o.e.pickDriver(ctx, name); err != nil {
			return err
		}
		if name == "auto" && driver != o.e.c.Drivers[0] {
			o.tellFallback(driver, caps)
		}
		return o.fits(ctx, driver, caps)
	})
	return driver, caps, err
}

// fits finds what the driver or a capability cannot do for the VM.
func (o *operation) fits(ctx context.Context, driver vmm.Driver, caps vmm.Caps) error {
	spec := o.v.Spec
	switch {
	case caps.MaxCPUs > 0 && spec.CPUs > caps.MaxCPUs:
		return fault.New(fault.Usage, "%s runs VMs with at most %d CPUs, not %d", driver.Name(), caps.MaxCPUs, spec.CPUs)
	case spec.NetRate > 0 && !caps.NetRate:
		return fault.New(fault.Precondition, "%s cannot limit the network rate of VM %s", driver.Name(), spec.Name).
			WithHint("run it on Firecracker, which can, or make it without --net-rate")
	case spec.Balloon && !caps.Balloon:
		return fault.New(fault.Precondition, "%s %s has no balloon that takes the unused memory of VM %s back", driver.Name(), caps.Version, spec.Name).
			WithHint("Firecracker 1.14 and newer and QEMU have one; or make the VM without --balloon")
	}
	for _, c := range o.wanted() {
		if err := c.Check(ctx, o.v); err != nil {
			return err
		}
	}
	return nil
}

// tellFallback says once for each reason that the best VMM is not the one that is used.
func (o *operation) tellFallback(driver vmm.Driver, caps vmm.Caps) {
	text := fmt.Sprintf("VMs run on %s (%s): %s", driver.Name(), caps.Accelerator, caps.SlowReason)
	o.e.mu.Lock()
	defer o.e.mu.Unlock()
	const most = 16 // a reason that changes all the time is not worth more
	if o.e.told[text] || len(o.e.told) >= most {
		return
	}
	o.e.told[text] = true
	o.sink.Notice(text)
}

// pickDriver returns the driver of that name, or for "auto" the first that can be used here. SlowReason then says
// also why a better one cannot.
func (e *Engine) pickDriver(ctx context.Context, name string) (vmm.Driver, vmm.Caps, error) {
	var why []string
	for _, d := range e.c.Drivers {
		if name != "auto" && name != d.Name() {
			continue
		}
		caps, err := d.Caps(ctx)
		if err == nil {
			caps.SlowReason = or(caps.SlowReason, strings.Join(why, "; "))
			return d, caps, nil
		}
		if name != "auto" || len(e.c.Drivers) == 1 {
			return nil, vmm.Caps{}, err
		}
		why = append(why, d.Name()+": "+err.Error())
	}
	return nil, vmm.Caps{}, fault.New(fault.Precondition, "no VMM can be used here: %s", strings.Join(why, "; ")).
		WithHint("see what is missing: banger doctor")
}

// bringUp takes a VM from its intent row to running, from wherever its machine comes. On failure all
// but the row is as before.
func (o *operation) bringUp(ctx context.Context, driver vmm.Driver, caps vmm.Caps, from origin) (err error) {
	u := undo.New()
	defer u.Unwind(ctx, &err)
	dir := o.e.c.Paths.VM(o.v.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot make the directory of VM %s", o.v.Spec.Name)
	}
	if err := removeUnfinished(dir); err != nil {
		return err
	}
	b := &capability.Build{
		Machine: &vmm.Machine{
			ID: o.v.ID, Name: o.v.Spec.Name, Dir: dir, CPUs: o.v.Spec.CPUs, MemoryBytes: o.v.Spec.MemoryBytes,
			DiskRate: o.v.Spec.DiskRate, NetRate: o.v.Spec.NetRate,
		},
		Guest:    &agentv1.GuestConfig{},
		Caps:     caps,
		Restored: from.restored(),
	}
	if from.template != "" {
		b.Template = from.saved
	}
	if err := o.noteTemplate(from); err != nil {
		return err
	}
	if err := o.capabilitiesUp(ctx, u, b); err != nil {
		return err
	}
	m, err := o.spawn(ctx, u, driver, b, from)
	if err != nil {
		return err
	}
	if err := o.awaitGuest(ctx, m, b, from); err != nil {
		return err
	}
	if err := o.ready(ctx, m, from); err != nil {
		return err
	}
	u.Keep()
	o.e.adoptMachine(m)
	return nil
}

func (o *operation) capabilitiesUp(ctx context.Context, u *undo.Stack, b *capability.Build) error {
	for _, c := range o.wanted() {
		err := o.stage(ctx, c.Name(), func(ctx context.Context) error {
			note, err := c.Up(ctx, o.v, b)
			if err != nil {
				return err
			}
			o.setNote(c.Name(), note)
			u.Push(c.Name(), func(ctx context.Context) error { return c.Down(ctx, o.v) })
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// spawn starts the machine's process, and remembers it in the row.
func (o *operation) spawn(ctx context.Context, u *undo.Stack, driver vmm.Driver, b *capability.Build, from origin) (m *machine, err error) {
	err = o.stage(ctx, from.stage(), func(ctx context.Context) error {
		running, err := from.start(ctx, driver, *b.Machine)
		if err != nil {
			return err
		}
		m = newMachine(o.v.ID, running).withWords()
		u.Push("machine", m.stop)
		o.hook(stageMachine)
		o.v.Accelerator, o.v.SlowReason = b.Caps.Accelerator, b.Caps.SlowReason
		return o.remember(running)
	})
	return m, err
}

// remember notes how the machine is found again.
func (o *operation) remember(running vmm.Running) error {
	handle, err := json.Marshal(running.Handle())
	if err != nil {
		return fmt.Errorf("handle of VM %s: %w", o.v.Spec.Name, err)
	}
	o.v.Handle = handle
	return nil
}

// awaitGuest waits for the agent of a guest that boots; one that was restored is told what it has to know.
func (o *operation) awaitGuest(ctx context.Context, m *machine, b *capability.Build, from origin) error {
	if from.restored() {
		return o.stage(ctx, stageIdentity, func(ctx context.Context) error {
			if err := o.identify(ctx, m, b, from); err != nil || from.verdict == nil {
				return err
			}
			return from.verdict(ctx)
		})
	}
	return o.stage(ctx, stageAgent, func(ctx context.Context) error {
		return o.ask(ctx, m, o.e.c.BootTimeout, func(ctx context.Context) (bool, error) {
			_, err := m.agent.Ping(ctx, &agentv1.PingRequest{})
			return true, err
		})
	})
}

// ask puts a question to the agent until it answers, the machine ends, or the time is over. The
// question tells whether it may be put again after that error.
func (o *operation) ask(ctx context.Context, m *machine, limit time.Duration, question func(context.Context) (again bool, err error)) error {
	waiting, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	for {
		again, err := question(waiting)
		if err == nil || !again && !m.ended() && waiting.Err() == nil {
			return err
		}
		pause := time.NewTimer(pingPause)
		select {
		case <-m.running.Done():
			pause.Stop()
			return o.endedWhileBooting(m)
		case <-waiting.Done():
			pause.Stop()
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			if errors.Is(err, context.DeadlineExceeded) {
				err = nil // the text says it already
			}
			return fault.Wrap(fault.Timeout, err, "the guest of VM %s did not answer within %s", o.v.Spec.Name, limit).
				WithHint("%s", o.consoleHint())
		case <-pause.C:
		}
	}
}

func (o *operation) endedWhileBooting(m *machine) error {
	exit := m.running.Exit()
	return fault.New(fault.Unexpected, "VM %s ended while it started (%s): %s", o.v.Spec.Name, exit.Kind, exit.Detail).
		WithHint("%s", o.consoleHint())
}

// consoleHint says where the guest's console can be read. That of a VM which is being made goes with it, so its
// end is in the hint itself.
func (o *operation) consoleHint() string {
	path := o.file(vmm.SerialLog)
	if o.console != "" {
		path = o.console
	}
	if !o.v.Creating {
		return "its console is in " + path
	}
	keep := fmt.Sprintf("to keep all of its console (%s), make it with banger vm create --no-start, then: banger vm start %s", vmm.SerialLog, o.v.Spec.Name)
	end := consoleEnd(path)
	if end == "" {
		return "its console is empty; " + keep
	}
	return keep + "; its console ended with:\n" + end
}

// Bounds of what a hint shows of a console.
const (
	consoleBytes = 2 << 10
	consoleLines = 8
)

// consoleEnd returns the last lines of a console, without what could do something to the reader's terminal.
func consoleEnd(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return ""
	}
	text, err := io.ReadAll(io.NewSectionReader(f, max(0, info.Size()-consoleBytes), consoleBytes))
	if err != nil {
		return ""
	}
	var lines []string
	for line := range strings.FieldsFuncSeq(string(text), func(r rune) bool { return r == '\n' || r == '\r' }) {
		if line = fault.Printable(line); line != "" {
			lines = append(lines, line)
		}
	}
	return strings.Join(lines[max(0, len(lines)-consoleLines):], "\n")
}

// ready lets capabilities do their part in the guest and says in the row that the VM runs.
func (o *operation) ready(ctx context.Context, m *machine, from origin) error {
	before := o.v
	err := o.stage(ctx, stageReady, func(ctx context.Context) error {
		if !from.restored() {
			if err := o.guestReady(ctx, m); err != nil {
				return err
			}
		}
		if _, err := o.move(vm.Booted); err != nil {
			return err
		}
		o.v.Creating, o.v.StartedAt, o.v.Reason = false, o.e.c.Now().UTC(), ""
		return nil
	})
	if err != nil { // perhaps only the row could not be written: it does not run before that says so
		o.v.State, o.v.Creating, o.v.StartedAt = before.State, before.Creating, before.StartedAt
	}
	return err
}

func (o *operation) guestReady(ctx context.Context, m *machine) error {
	ctx, cancel := context.WithTimeout(ctx, o.e.c.BootTimeout)
	defer cancel()
	for _, c := range o.wanted() {
		if g, ok := c.(capability.GuestReadier); ok {
			if err := g.GuestReady(ctx, o.v, m.running); err != nil {
				return fmt.Errorf("%s in the guest of VM %s: %w", c.Name(), o.v.Spec.Name, err)
			}
		}
	}
	return nil
}

// giveUp writes the row after a bring-up that failed and was taken back: a VM that was just being
// made is erased, another one is failed with the reason, or stopped when that was wished.
func (o *operation) giveUp(ctx context.Context, cause error) error {
	o.sink.Notice("taking back what was made")
	o.sink = nil // the stages of the way back have the names of the way up
	stopped := errors.Is(cause, errStopAsked)
	o.v.Handle, o.v.StartedAt = nil, time.Time{}
	if o.v.Creating && !stopped {
		return errors.Join(cause, o.eraseFailed(ctx))
	}
	o.v.Creating = false
	var err error
	if stopped || fault.KindOf(cause) == fault.Interrupted {
		_, err1 := o.move(vm.AskStop)
		_, err2 := o.move(vm.TakenDown)
		err = errors.Join(err1, err2)
	} else {
		o.v.Reason = clip(cause.Error())
		_, err = o.move(vm.BootFailed)
	}
	return errors.Join(cause, err, o.save(ctx))
}

// eraseFailed removes all of a VM whose create did not end well. Its row says already what is to be
// done, so nothing is written before the files are gone: the reason may be that the disk is full.
func (o *operation) eraseFailed(ctx context.Context) error {
	if o.v.State == vm.Starting {
		if _, err := o.move(vm.BootFailed); err != nil {
			return err
		}
	}
	if _, err := o.move(vm.AskDelete); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), eraseTimeout)
	defer cancel()
	o.recorded = false
	return o.finishErase(ctx)
}
