// Package capability holds what a VM can have: disks, a network, keys, an agent. Each is a set of
// hooks in one pipeline that the engine runs in order on start and in reverse on stop.
package capability

import (
	"context"
	"encoding/json"

	agentv1 "banger/api/agent/v1"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// Note is what a capability must remember for its Down: JSON, stored in the VM's row before the
// next stage begins. It survives stop: the Up of the next start finds it in VM.Notes.
type Note = json.RawMessage

// Build is the machine and the guest config that capabilities fill in while they come up.
type Build struct {
	Machine *vmm.Machine
	Guest   *agentv1.GuestConfig
	Caps    vmm.Caps

	// Restored says that the guest goes on from saved memory: nothing boots, so no initramfs is needed, and
	// Guest is for its agent.
	Restored bool
	// Template, when set, is the directory of the template that a new VM is restored from: its disks are
	// clones of those in it.
	Template string
	// Making says that the machine is to become a template: nobody's, without an address, and it reaches nothing.
	Making bool
}

// Capability is one thing a VM can have.
type Capability interface {
	// Name is the stage name in progress, logs, events, timings and the bench.
	Name() string
	// Wants tells whether a VM of this spec has it.
	Wants(vm.Spec) bool
	// Check finds what would make Up fail, and changes nothing. It runs before any Up, at create and at start.
	Check(context.Context, vm.VM) error
	// Up makes it so and fills the build. It may be called again with what an earlier one made; on
	// error it leaves nothing new behind, and the note it returns is ignored.
	Up(context.Context, vm.VM, *Build) (Note, error)
	// Down takes back what does not outlive a stop. It works with nothing but the VM's row, on
	// what is half made or already gone.
	Down(context.Context, vm.VM) error
}

// GuestReadier is a capability with work to do once the agent of a guest that booted answers.
type GuestReadier interface {
	GuestReady(context.Context, vm.VM, vmm.Running) error
}

// Shaper is a capability that puts something into a guest's memory or on its disks that a guest restored from
// a template cannot be told later. It writes that into the shape, and changes nothing else.
type Shaper interface {
	Shape(context.Context, vm.VM, vmm.Caps, *template.Shape) error
}

// Inheriter is a capability whose note is about what is on the disks or in the memory: it goes with them to a VM
// that is made of another one. Inherits does nothing.
type Inheriter interface {
	Inherits()
}

// Reattacher is a capability that must do something when a restarted daemon adopts a running VM.
type Reattacher interface {
	Reattach(context.Context, vm.VM) error
}

// Updater is a capability that can follow a change of the spec while the VM runs. It may be called when nothing of
// it has changed.
type Updater interface {
	Update(context.Context, vm.VM) error
}

// Eraser is a capability that holds something outside the VM's directory until the VM is deleted.
type Eraser interface {
	Erase(context.Context, vm.VM) error
}

// Sweeper is a capability that makes things outside the VMs' directories. Sweep removes those that
// belong to none of the VMs, and returns what it removed as sentences. It runs before the first verb.
type Sweeper interface {
	Sweep(context.Context, []vm.VM) ([]string, error)
}
