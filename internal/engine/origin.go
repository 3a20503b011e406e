package engine

import (
	"context"
	"crypto/rand"
	"fmt"
	"time"

	"connectrpc.com/connect"

	agentv1 "banger/api/agent/v1"
	"banger/internal/capability"
	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/vmm"
)

// identityTimeout bounds how long a restored guest may take to answer, file systems grown.
const identityTimeout = 30 * time.Second

// entropyBytes is what a restored guest gets, so that its random numbers are its own.
const entropyBytes = 64

// clockTimeout bounds how long the clock of a guest is set.
const clockTimeout = 5 * time.Second

// origin is where a machine comes from. The zero origin boots.
type origin struct {
	saved     string // directory of the saved memory that it goes on from; empty: it boots
	template  string // key of the template that the saved memory is of; empty: the VM's own
	identity  bool   // the saved guest was another VM and becomes this one
	growDisks bool   // its disks may be larger than they were
}

func (f origin) restored() bool { return f.saved != "" }

// stage is the name of the stage that starts the process.
func (f origin) stage() string {
	if f.restored() {
		return stageLoad
	}
	return stageBoot
}

// start starts the process.
func (f origin) start(ctx context.Context, d vmm.Driver, m vmm.Machine) (vmm.Running, error) {
	if !f.restored() {
		if err := d.Check(ctx, m); err != nil {
			return nil, err
		}
		return d.Start(ctx, m)
	}
	r, ok := d.(vmm.Restorer)
	if !ok {
		return nil, fault.New(fault.Precondition, "%s cannot restore VMs from memory", d.Name())
	}
	if err := r.CheckSaved(ctx, m, f.saved); err != nil {
		return nil, err
	}
	return r.Restore(ctx, m, f.saved)
}

// identify is the first word to a restored guest. When it returns the guest has the time and random
// numbers of its own, and is this VM.
func (o *operation) identify(ctx context.Context, m *machine, b *capability.Build, from origin) error {
	entropy := make([]byte, entropyBytes)
	if _, err := rand.Read(entropy); err != nil {
		return fault.Wrap(fault.Unexpected, err, "no random numbers for VM %s", o.v.Spec.Name)
	}
	r := &agentv1.AdoptRequest{Entropy: entropy, GrowDisks: from.growDisks}
	if from.identity {
		r.Identity = b.Guest
	}
	var clock guest.Offset
	err := o.ask(ctx, m, identityTimeout, func(ctx context.Context) (bool, error) {
		asked := o.e.c.Now()
		r.UnixNanos = asked.UnixNano()
		res, err := m.agent.Adopt(ctx, r)
		if err == nil {
			// It was set to what was true when it was asked, and cannot be ahead.
			clock = guest.Heard(res.GetUnixNanos(), asked, o.e.c.Now()).Behind()
			o.log.Debug("restored guest", "clock_step", time.Duration(res.GetStepNanos()))
			return false, nil
		}
		// A stream that broke is opened again; what the agent could not do stays undone.
		again := connect.CodeOf(err) == connect.CodeUnavailable
		return again, fault.Wrap(fault.Unexpected, err, "the guest of VM %s did not become this VM again", o.v.Spec.Name)
	})
	if err != nil {
		return err
	}
	o.setClockFrom(ctx, m, clock)
	return nil
}

// setClock makes the clock of a guest right that stood still, for the clock did as well. The user hears of one that does
// not become right, and nothing fails.
func (o *operation) setClock(ctx context.Context, m *machine) { o.setClockFrom(ctx, m, guest.Unknown) }

// setClockFrom is setClock when the guest has said something of its clock already.
func (o *operation) setClockFrom(ctx context.Context, m *machine, known guest.Offset) {
	ctx, cancel := context.WithTimeout(ctx, clockTimeout)
	defer cancel()
	offset, err := m.agent.SetClock(ctx, o.e.c.Now, known)
	o.log.Debug("guest clock", "least", offset.Least, "most", offset.Most, "error", err)
	if err != nil {
		o.sink.Notice(fmt.Sprintf("the clock of VM %s may be wrong: %v", o.v.Spec.Name, err))
	}
}
