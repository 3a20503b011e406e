package engine

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io"
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

// cloneRest is how long the programs of a template's clone may rest in software emulation, where they take a processor
// of the host's when they go on: as long as who enters it by SSH takes to get in.
const cloneRest = 3 * time.Second

// clockTimeout bounds how long the clock of a guest is set.
const clockTimeout = 5 * time.Second

// origin is where a machine comes from. The zero origin boots.
type origin struct {
	saved     string // directory of the saved memory that it goes on from; empty: it boots
	template  string // key of the template that the saved memory is of; empty: the VM's own
	identity  bool   // the saved guest was another VM and becomes this one
	growDisks bool   // its disks may be larger than they were

	// verdict waits for whether the files it comes from are whole; nil: nobody looks into them meanwhile.
	verdict func(context.Context) error
	loading func() // is called when what it comes from is about to be loaded; nil: nobody wants to know
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
	if f.loading != nil {
		f.loading()
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
	r := &agentv1.AdoptRequest{Entropy: newEntropy(), GrowDisks: from.growDisks}
	if from.identity {
		r.Identity = b.Guest
	}
	if from.template != "" && b.Caps.Accelerator == "tcg" {
		r.RestMillis = int32(cloneRest.Milliseconds())
	}
	return o.ask(ctx, m, identityTimeout, func(ctx context.Context) (again bool, err error) {
		var response *agentv1.AdoptResponse
		if err = o.trySetClock(ctx, m); err == nil {
			response, err = m.agent.Adopt(ctx, r)
		}
		if err == nil {
			if response.GetLate() {
				o.sink.Notice(fmt.Sprintf("programs of VM %s ran on before it knew who it is: the host was too slow to tell", o.v.Spec.Name))
			}
			return false, nil
		}
		return broke(err), fault.Wrap(fault.Unexpected, err, "the guest of VM %s did not become this VM again", o.v.Spec.Name)
	})
}

// broke tells that a stream broke, perhaps in the middle of the answer: it is opened again. What the agent could not do stays undone.
func broke(err error) bool {
	return connect.CodeOf(err) == connect.CodeUnavailable || errors.Is(err, io.ErrUnexpectedEOF)
}

func newEntropy() []byte {
	entropy := make([]byte, entropyBytes)
	_, _ = rand.Read(entropy) // never fails
	return entropy
}

// letGo lets the programs of a guest run on that were held while it was copied: it is who it was. Should it not hear
// that, it does so by itself some seconds later.
func (o *operation) letGo(ctx context.Context, m *machine) {
	err := o.ask(context.WithoutCancel(ctx), m, clockTimeout, func(ctx context.Context) (again bool, err error) {
		_, err = m.agent.Adopt(ctx, &agentv1.AdoptRequest{Entropy: newEntropy()})
		return broke(err), err
	})
	if err != nil && !m.ended() { // else its watcher tells
		o.sink.Notice(fmt.Sprintf("the programs of VM %s stand still some seconds longer: %v", o.v.Spec.Name, err))
	}
}

// setClock makes the clock of a guest right that stood still, for the clock did as well. The user hears of one that does
// not become right, and nothing fails. Of a machine that was saved all streams may be reset.
func (o *operation) setClock(ctx context.Context, m *machine) {
	err := o.ask(ctx, m, clockTimeout, func(ctx context.Context) (again bool, err error) {
		err = o.trySetClock(ctx, m)
		return broke(err), err
	})
	if err != nil && !m.ended() {
		o.tellClock(err)
	}
}

// trySetClock is setClock for a guest that may not answer yet, which is its error.
func (o *operation) trySetClock(ctx context.Context, m *machine) error {
	ctx, cancel := context.WithTimeout(ctx, clockTimeout)
	defer cancel()
	offset, err := m.agent.SetClock(ctx, o.e.c.Now, guest.Unknown)
	o.log.Debug("guest clock", "least", offset.Least, "most", offset.Most, "error", err)
	if fault.KindOf(err) == fault.Timeout {
		o.tellClock(err)
		return nil
	}
	return err
}

func (o *operation) tellClock(err error) {
	o.sink.Notice(fmt.Sprintf("the clock of VM %s may be wrong: %v", o.v.Spec.Name, err))
}
