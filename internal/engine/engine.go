// Package engine runs the lives of VMs: it owns each of them, checks before it touches, brings
// capabilities up and down, takes back what failed, and after the daemon's death finds out what
// still lives and takes back the rest.
//
// Each VM has one owner at a time: whoever holds its lock. Verbs on different VMs proceed
// concurrently; reading waits for nobody. Where a VM is in its life is decided by vm.Next alone, and
// every state that is passed through is in its row before the first side effect.
package engine

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"banger/internal/capability"
	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// Defaults of Config.
const (
	DefaultBootTimeout = 3 * time.Minute
	DefaultStopTimeout = 30 * time.Second

	DefaultQuiesceTimeout = 20 * time.Second
)

// closeTimeout bounds how long Close waits for verbs that take back what they did.
const closeTimeout = 20 * time.Second

// Config is what an engine is made of.
type Config struct {
	Store        *store.Store
	Paths        paths.Paths
	Drivers      []vmm.Driver            // in order of preference for "auto"
	Capabilities []capability.Capability // in order of start
	Logger       *slog.Logger
	BootTimeout  time.Duration // until the agent's first answer; 0: DefaultBootTimeout
	StopTimeout  time.Duration // for the guest's own shutdown; 0: DefaultStopTimeout

	// QuiesceTimeout is for a guest that is suspended to write out its data; 0: DefaultQuiesceTimeout.
	QuiesceTimeout time.Duration
	Limits         vm.Limits
	Templates      TemplateConfig

	// Allocate picks an address that is not in taken (hostnet.Allocate on the bridge's subnet); nil: VMs have none.
	Allocate func(taken map[netip.Addr]bool) (netip.Addr, error)
	// MAC returns a VM's hardware address (hostnet.MAC); nil: VMs have none.
	MAC func(vm.ID) string

	// HostBoot tells one start of this host from another (/proc/sys/kernel/random/boot_id); empty: unknown.
	HostBoot string

	// Now is the clock of rows and events; nil: time.Now.
	Now func() time.Time
	// AfterStage, when set, is called after each stage of each operation, its row included.
	AfterStage func(operation, stage string)
}

// Engine owns the VMs of one store. Its methods may be called from several goroutines; a VM is
// named by its name or its id.
type Engine struct {
	c     Config
	log   *slog.Logger
	locks locks

	life context.Context // ends with Close
	end  context.CancelCauseFunc

	mu     sync.Mutex
	closed bool
	verbs  sync.WaitGroup // verbs and watchers under way; grows under mu while not closed
	live   map[vm.ID]*machine

	reboots map[vm.ID][]time.Time // the last ones of each VM
	told    map[string]bool       // slower paths that were told

	maker *maker // of templates
}

// errClosing is why verbs end when the engine is closed under them.
var errClosing = fault.New(fault.Interrupted, "the daemon is shutting down")

// New returns an engine. Call Reconcile before the first verb, and Close at the end.
func New(c Config) *Engine {
	if c.BootTimeout == 0 {
		c.BootTimeout = DefaultBootTimeout
	}
	if c.StopTimeout == 0 {
		c.StopTimeout = DefaultStopTimeout
	}
	if c.QuiesceTimeout == 0 {
		c.QuiesceTimeout = DefaultQuiesceTimeout
	}
	if c.Now == nil {
		c.Now = time.Now
	}
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	c.Templates = c.Templates.withDefaults()
	life, end := context.WithCancelCause(context.Background())
	return &Engine{c: c, log: c.Logger, life: life, end: end, live: map[vm.ID]*machine{}, reboots: map[vm.ID][]time.Time{}, told: map[string]bool{}, maker: newMaker()}
}

// Get returns a VM.
func (e *Engine) Get(ctx context.Context, ref string) (vm.VM, error) { return e.c.Store.Get(ctx, ref) }

// List returns all VMs by name. It waits for nobody.
func (e *Engine) List(ctx context.Context) ([]vm.VM, error) { return e.c.Store.List(ctx) }

// Events returns the newest events of a VM, oldest first; limit 0 means 100. Of a name that no VM has
// any more it returns what happened to those that had it.
func (e *Engine) Events(ctx context.Context, ref string, limit int) ([]store.Event, error) {
	if limit <= 0 {
		limit = 100
	}
	limit = min(limit, 1000)
	v, err := e.c.Store.Get(ctx, ref)
	if err == nil {
		return e.c.Store.Events(ctx, v.ID, limit)
	}
	if fault.KindOf(err) == fault.NotFound {
		past, errPast := e.c.Store.EventsNamed(ctx, ref, limit)
		if errPast != nil || len(past) > 0 {
			return past, errPast
		}
	}
	return nil, err
}

// Agent returns the client of a running VM's agent, which stays the engine's: do not close it. A VM
// that does not run is a Conflict fault.
func (e *Engine) Agent(ctx context.Context, ref string) (*guest.Client, error) {
	v, err := e.c.Store.Get(ctx, ref)
	if err != nil {
		return nil, err
	}
	m := e.machineOf(v.ID)
	if m == nil && v.State.HasProcess() {
		// The row says so already, or still: its owner is about to have the machine, or about to write what became of it.
		if v, m, err = e.settled(ctx, v); err != nil {
			return nil, err
		}
	}
	if m != nil {
		return m.agent, nil
	}
	refusal := fault.New(fault.Conflict, "VM %s is not running: it is %s", v.Spec.Name, v.State)
	switch {
	case v.State == vm.Starting || v.State == vm.Resuming:
		return nil, refusal.WithHint("wait until it has started, then try again")
	case v.State == vm.Suspended:
		return nil, refusal.WithHint("resume it: banger vm resume %s", v.Spec.Name)
	case v.State.HasProcess():
		return nil, notHeld(v.Spec.Name)
	}
	return nil, refusal.WithHint("start it: banger vm start %s", v.Spec.Name)
}

// settled returns a VM and its machine once nobody works on it.
func (e *Engine) settled(ctx context.Context, v vm.VM) (vm.VM, *machine, error) {
	release, err := e.locks.acquire(ctx, v.ID)
	if err != nil {
		return v, nil, interrupted(ctx, "use", v, err)
	}
	defer release()
	now, err := e.again(ctx, v)
	return now, e.machineOf(v.ID), err
}

// again returns a VM as it is now that the caller's turn has come.
func (e *Engine) again(ctx context.Context, v vm.VM) (vm.VM, error) {
	now, err := e.c.Store.Get(ctx, string(v.ID))
	if fault.KindOf(err) == fault.NotFound { // which names what was asked for: the id, of which the user knows nothing
		return now, fault.New(fault.NotFound, "VM %s was deleted meanwhile", v.Spec.Name)
	}
	return now, err
}

func notHeld(name string) error {
	return fault.New(fault.Conflict, "VM %s runs, but this daemon could not take hold of it", name).
		WithHint("see banger daemon logs, or restart it: banger vm restart %s", name)
}

// Close lets go of the VMs, which run on. Verbs under way are cancelled and take back what they did.
func (e *Engine) Close() error {
	e.mu.Lock()
	e.closed = true
	e.mu.Unlock()
	e.end(errClosing)
	err := e.waitForVerbs()
	e.mu.Lock()
	defer e.mu.Unlock()
	for id, m := range e.live {
		delete(e.live, id)
		err = errors.Join(err, m.letGo())
	}
	return err
}

func (e *Engine) waitForVerbs() error {
	done := make(chan struct{})
	go func() {
		e.verbs.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-time.After(closeTimeout):
		return fault.New(fault.Timeout, "verbs under way did not end within %s", closeTimeout)
	}
}

// enter counts a verb or a watcher in; leave with e.verbs.Done.
func (e *Engine) enter() error {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		return errClosing
	}
	e.verbs.Add(1)
	return nil
}

// Create records a VM and, with start, brings it up. When it fails or is cancelled nothing is left,
// the row included.
func (e *Engine) Create(ctx context.Context, spec vm.Spec, start bool, sink progress.Sink) (vm.VM, error) {
	if err := spec.Validate(e.c.Limits); err != nil {
		return vm.VM{}, err
	}
	v := vm.VM{ID: vm.NewID(), Spec: spec, State: vm.Stopped, CreatedAt: e.c.Now().UTC()}
	if e.c.MAC != nil {
		v.MAC = e.c.MAC(v.ID)
	}
	ctx, o, err := e.beginNew(ctx, v, "create", sink)
	if err != nil {
		return vm.VM{}, err
	}
	defer o.end()
	if err := o.create(ctx, start); err != nil {
		return vm.VM{}, err
	}
	return o.v, nil
}

// Start brings a VM up: a suspended one is resumed, any other one boots. A running one stays as it is.
func (e *Engine) Start(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	return e.bring(ctx, ref, "start", vm.AskStart, sink)
}

// Boot is Start that never resumes: the saved memory of a suspended VM is dropped, its disks stay.
func (e *Engine) Boot(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	return e.bring(ctx, ref, "start", vm.AskBoot, sink)
}

// Resume is Start of a suspended VM; any other one is a Conflict fault.
func (e *Engine) Resume(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	return e.bring(ctx, ref, "resume", vm.AskResume, sink)
}

func (e *Engine) bring(ctx context.Context, ref, name string, ask vm.Event, sink progress.Sink) (vm.VM, error) {
	return e.verb(ctx, ref, name, sink, func(ctx context.Context, o *operation) error { return o.start(ctx, ask) })
}

// SetVMM says under which VMM a VM that is stopped, or failed, is started from then on: a driver's name, or auto.
// Its disks and identity are the same under each.
func (e *Engine) SetVMM(ctx context.Context, ref, name string) error {
	_, err := e.verb(ctx, ref, "set", nil, func(ctx context.Context, o *operation) error { return o.setVMM(ctx, name) })
	return err
}

// Suspend writes the memory of a running VM to disk and ends its process; Start resumes it. When that
// fails or is cancelled before the memory is saved, the VM runs on.
func (e *Engine) Suspend(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	return e.verb(ctx, ref, "suspend", sink, func(ctx context.Context, o *operation) error { return o.suspend(ctx) })
}

// Stop shuts a VM down: it asks the agent, then presses the power button, then kills. With force it
// kills at once. A start under way is cancelled. Once begun it goes on without its caller.
func (e *Engine) Stop(ctx context.Context, ref string, force bool, sink progress.Sink) (vm.VM, error) {
	if err := e.interrupt(ctx, ref, errStopAsked); err != nil {
		return vm.VM{}, err
	}
	return e.verb(ctx, ref, "stop", sink, func(ctx context.Context, o *operation) error {
		return o.stop(ctx, force)
	})
}

// Restart stops a VM, if it runs, and boots it. A suspended one loses its saved memory.
func (e *Engine) Restart(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	return e.verb(ctx, ref, "restart", sink, func(ctx context.Context, o *operation) error {
		if o.v.State.HasProcess() {
			if err := o.takeDown(ctx, false); err != nil {
				return err
			}
		}
		return o.start(ctx, vm.AskBoot)
	})
}

// Delete removes a VM and its disks; one that runs or starts only with force.
func (e *Engine) Delete(ctx context.Context, ref string, force bool, sink progress.Sink) error {
	v, err := e.c.Store.Get(ctx, ref)
	if err != nil {
		return err
	}
	if force {
		e.locks.interrupt(v.ID, errDeleteAsked)
	} else if v.State == vm.Starting || v.State == vm.Resuming || v.State.HasProcess() {
		_, _, err := vm.Next(v.State, vm.AskDelete)
		return fault.Wrap(fault.KindOf(err), err, "VM %s is not deleted", v.Spec.Name)
	}
	_, err = e.verb(ctx, string(v.ID), "delete", sink, func(ctx context.Context, o *operation) error {
		return o.delete(ctx, force)
	})
	if fault.KindOf(err) == fault.NotFound {
		return nil // whoever had it before us took it away: a create that was cancelled, another delete
	}
	return err
}

// interrupt cancels the start, create or suspend that is under way for ref, if there is one.
func (e *Engine) interrupt(ctx context.Context, ref string, cause error) error {
	v, err := e.c.Store.Get(ctx, ref)
	if err == nil {
		e.locks.interrupt(v.ID, cause)
	}
	return err
}

// verb runs f as the owner of a VM and returns the VM as it is afterwards.
func (e *Engine) verb(ctx context.Context, ref, name string, sink progress.Sink, f func(context.Context, *operation) error) (vm.VM, error) {
	ctx, o, err := e.begin(ctx, ref, name, sink)
	if err != nil {
		return vm.VM{}, err
	}
	defer o.end()
	if _, err := o.mend(ctx); err != nil {
		return vm.VM{}, err
	}
	if o.v.State == vm.Gone {
		return vm.VM{}, fault.New(fault.NotFound, "no VM named %s: what was left of it was taken back", ref)
	}
	if err := f(ctx, o); err != nil {
		return vm.VM{}, err
	}
	return o.v, nil
}
