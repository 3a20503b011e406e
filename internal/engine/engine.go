// Package engine runs the lives of VMs: it owns each of them, checks before it touches, brings
// capabilities up and down, takes back what failed, and after the daemon's death finds out what
// still lives and takes back the rest.
package engine

import (
	"context"
	"errors"
	"log/slog"
	"net/netip"
	"time"

	"banger/internal/capability"
	"banger/internal/guest"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/store"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// Config is what an engine is made of.
type Config struct {
	Store        *store.Store
	Paths        paths.Paths
	Drivers      []vmm.Driver            // in order of preference for "auto"
	Capabilities []capability.Capability // in order of start
	Logger       *slog.Logger
	BootTimeout  time.Duration // until the agent's first answer; 0: three minutes
	StopTimeout  time.Duration // for the guest's own shutdown; 0: thirty seconds
	Limits       vm.Limits

	// Allocate picks an address that is not in taken (hostnet.Allocate on the bridge's subnet).
	Allocate func(taken map[netip.Addr]bool) (netip.Addr, error)
	// MAC returns a VM's hardware address (hostnet.MAC).
	MAC func(vm.ID) string

	// Now is the clock of rows and events; nil: time.Now.
	Now func() time.Time
	// AfterStage, when set, is called after each stage of each operation.
	AfterStage func(operation, stage string)
}

// Engine owns the VMs of one store. Its methods may be called from several goroutines; a VM is
// named by its name or its id.
type Engine struct {
	c Config
}

// New returns an engine. Call Reconcile before the first verb, and Close at the end.
func New(c Config) *Engine { return &Engine{c: c} }

var errTODO = errors.New("not built yet")

// Create records a VM and, with start, brings it up. When it fails or is cancelled nothing is left, the row included.
func (e *Engine) Create(ctx context.Context, spec vm.Spec, start bool, sink progress.Sink) (vm.VM, error) {
	return vm.VM{}, errTODO
}

// Start brings a VM up. A running one stays as it is.
func (e *Engine) Start(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	return vm.VM{}, errTODO
}

// Stop shuts a VM down: it asks the agent, then presses the power button, then kills. With force it kills at once.
func (e *Engine) Stop(ctx context.Context, ref string, force bool, sink progress.Sink) (vm.VM, error) {
	return vm.VM{}, errTODO
}

// Restart stops a VM, if it runs, and starts it.
func (e *Engine) Restart(ctx context.Context, ref string, sink progress.Sink) (vm.VM, error) {
	return vm.VM{}, errTODO
}

// Delete removes a VM and its disks; a running one only with force.
func (e *Engine) Delete(ctx context.Context, ref string, force bool, sink progress.Sink) error {
	return errTODO
}

// Get returns a VM.
func (e *Engine) Get(ctx context.Context, ref string) (vm.VM, error) { return vm.VM{}, errTODO }

// List returns all VMs by name. It waits for nobody.
func (e *Engine) List(ctx context.Context) ([]vm.VM, error) { return nil, errTODO }

// Events returns the newest events of a VM, oldest first; limit 0 means 100.
func (e *Engine) Events(ctx context.Context, ref string, limit int) ([]store.Event, error) {
	return nil, errTODO
}

// Agent returns the client of a running VM's agent, which stays the engine's: do not close it. A VM
// that does not run is a Conflict fault.
func (e *Engine) Agent(ctx context.Context, ref string) (*guest.Client, error) { return nil, errTODO }

// Reconcile compares the rows with what is on this host, adopts machines that live, takes back the
// rest, and returns what it mended as sentences. It is called once, before the first verb.
func (e *Engine) Reconcile(ctx context.Context) ([]string, error) { return nil, errTODO }

// Close lets go of the VMs, which run on. Verbs under way are cancelled and take back what they did.
func (e *Engine) Close() error { return nil }
