package capability

import (
	"context"

	"banger/internal/vm"
)

// Forwards opens ports of the host that lead into VMs: *forward.Forwarder.
type Forwards interface {
	// Check finds ports that cannot be opened for a VM.
	Check(id vm.ID, ports []vm.Port) error
	// Set makes these the open ports of a VM.
	Set(id vm.ID, ports []vm.Port) error
}

// ports are the VM's forwarded ports, open while it runs.
type ports struct{ o Options }

func (*ports) Name() string { return "ports" }

// Wants is true of all: one that has no ports now may have lost its last, or get its first, while it runs.
func (*ports) Wants(vm.Spec) bool { return true }

func (c *ports) Check(_ context.Context, v vm.VM) error {
	return c.o.Forwards.Check(v.ID, v.Spec.Ports)
}

func (c *ports) Up(_ context.Context, v vm.VM, b *Build) (Note, error) {
	if b.Making { // they are the VM's, not its template's
		return nil, nil
	}
	return nil, c.o.Forwards.Set(v.ID, v.Spec.Ports)
}

func (c *ports) Down(_ context.Context, v vm.VM) error { return c.o.Forwards.Set(v.ID, nil) }

// Update opens and closes what has changed.
func (c *ports) Update(_ context.Context, v vm.VM) error { return c.o.Forwards.Set(v.ID, v.Spec.Ports) }

// Reattach opens the ports again that closed with an earlier daemon.
func (c *ports) Reattach(_ context.Context, v vm.VM) error {
	return c.o.Forwards.Set(v.ID, v.Spec.Ports)
}
