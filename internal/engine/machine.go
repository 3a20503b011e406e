package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// machine is a VM's process and the client of its agent.
type machine struct {
	id      vm.ID
	running vmm.Running
	agent   *guest.Client
	taken   chan struct{} // closed when a verb takes the machine from its watcher
	once    sync.Once
	err     error // of letting go
}

func newMachine(id vm.ID, running vmm.Running) *machine {
	return &machine{id: id, running: running, agent: guest.NewClient(running.DialGuest), taken: make(chan struct{})}
}

// withWords is for a guest that nobody has asked yet. One that was found running may be of a build that knows no words, and
// lose by the first one what it runs for somebody.
func (m *machine) withWords() *machine {
	if s, ok := m.running.(vmm.Speaker); ok {
		m.agent.WithWords(s.SayGuest)
	}
	return m
}

// stop ends the process, if it has not ended, and lets go.
func (m *machine) stop(ctx context.Context) error {
	if err := m.running.Stop(ctx); err != nil {
		return errors.Join(err, m.letGo())
	}
	return m.letGo()
}

// letGo closes what we hold of the machine, which runs on; a second call does nothing more.
func (m *machine) letGo() error {
	m.once.Do(func() {
		m.agent.Close()
		m.err = m.running.Close()
	})
	return m.err
}

func (m *machine) ended() bool {
	select {
	case <-m.running.Done():
		return true
	default:
		return false
	}
}

func (m *machine) endsWithin(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-m.running.Done():
		return true
	case <-ctx.Done():
	case <-t.C:
	}
	return m.ended()
}

// adoptMachine makes m the machine of its VM and watches it. The caller owns the VM.
func (e *Engine) adoptMachine(m *machine) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.live[m.id] = m
	if e.closed {
		return // Close lets go of it
	}
	e.verbs.Add(1)
	go func() {
		defer e.verbs.Done()
		e.watch(m)
	}()
}

// machineOf returns the VM's machine, which stays with its watcher; nil when there is none.
func (e *Engine) machineOf(id vm.ID) *machine {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.live[id]
}

// holds tells whether the VM's machine is in our hands.
func (e *Engine) holds(id vm.ID) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, ok := e.live[id]
	return ok
}

// takeMachine takes the VM's machine from its watcher; nil when there is none.
func (e *Engine) takeMachine(id vm.ID) *machine {
	e.mu.Lock()
	defer e.mu.Unlock()
	m, ok := e.live[id]
	if !ok {
		return nil
	}
	delete(e.live, id)
	close(m.taken)
	return m
}

// adoptLeftover finds the machine that the row tells of, or one whose start the row does not know
// yet. It returns nil when there is none.
func (o *operation) adoptLeftover(ctx context.Context) (*machine, error) {
	if o.v.Driver == "" {
		return nil, nil
	}
	driver := o.e.driver(o.v.Driver)
	if driver == nil {
		return nil, fault.New(fault.Precondition, "VM %s was started by the driver %s, which this daemon does not have", o.v.Spec.Name, o.v.Driver)
	}
	var h vmm.Handle // zero: whatever runs in the VM's directory
	if o.v.Handle != nil {
		if err := json.Unmarshal(o.v.Handle, &h); err != nil {
			return nil, fmt.Errorf("handle of VM %s: %w", o.v.Spec.Name, err)
		}
	}
	running, err := driver.Adopt(ctx, o.remains(), h)
	if fault.KindOf(err) == fault.NotFound {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("find the machine of VM %s: %w", o.v.Spec.Name, err)
	}
	return newMachine(o.v.ID, running), nil
}

// remains is the machine as far as the row knows it.
func (o *operation) remains() vmm.Machine {
	return vmm.Machine{
		ID: o.v.ID, Name: o.v.Spec.Name, Dir: o.e.c.Paths.VM(o.v.ID), CPUs: o.v.Spec.CPUs, MemoryBytes: o.v.Spec.MemoryBytes,
	}
}

// coroner is a driver that can tell how a machine ended by what it left in its directory. It answers false
// when that is not certain.
type coroner interface {
	LastExit(vmm.Machine) (vmm.Exit, bool)
}

// lastExit tells how the VM's machine ended while no daemon watched it; the zero Exit when nobody knows.
func (o *operation) lastExit() vmm.Exit {
	c, ok := o.e.driver(o.v.Driver).(coroner)
	if !ok {
		return vmm.Exit{}
	}
	exit, certain := c.LastExit(o.remains())
	if !certain {
		return vmm.Exit{}
	}
	return exit
}

// killLeftover ends whatever process the VM still has.
func (o *operation) killLeftover(ctx context.Context) error {
	m, err := o.adoptLeftover(ctx)
	if err != nil {
		return err
	}
	if m != nil {
		o.log.Warn("ending a machine that was left over")
		if err := m.stop(ctx); err != nil {
			return err
		}
	}
	o.v.Handle = nil
	return nil
}

func (e *Engine) driver(name string) vmm.Driver {
	for _, d := range e.c.Drivers {
		if d.Name() == name {
			return d
		}
	}
	return nil
}
