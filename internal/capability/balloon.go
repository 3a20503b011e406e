package capability

import (
	"context"
	"time"

	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// balloonModule is the guest's driver. Nothing that boots needs it, so no initramfs has it.
const balloonModule = "virtio_balloon"

// loadTimeout bounds how long the guest may take to load a module.
const loadTimeout = 30 * time.Second

// balloon gives memory that the guest does not use back to the host. It is the engine that knows whether the VMM has one.
type balloon struct{}

func (balloon) Name() string                       { return "balloon" }
func (balloon) Wants(s vm.Spec) bool               { return s.Balloon }
func (balloon) Check(context.Context, vm.VM) error { return nil }

func (balloon) Up(_ context.Context, _ vm.VM, b *Build) (Note, error) {
	b.Machine.Balloon = true
	return nil, nil
}

// GuestReady loads the driver: the units that would load it by itself are masked.
func (balloon) GuestReady(ctx context.Context, _ vm.VM, running vmm.Running) error {
	ctx, cancel := context.WithTimeout(ctx, loadTimeout)
	defer cancel()
	client := guest.NewClient(running.DialGuest)
	defer client.Close()
	err := client.Succeed(ctx, "modprobe", balloonModule)
	if fault.KindOf(err) == fault.Precondition {
		return fault.Wrap(fault.Precondition, err, "the guest cannot give memory back").
			WithHint("its image needs the package kmod, its kernel the module %s; or make the VM without --balloon", balloonModule)
	}
	return err
}

// Down has nothing to take back.
func (balloon) Down(context.Context, vm.VM) error { return nil }
