package capability

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"
	"time"

	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/paths"
	"banger/internal/vm"
)

// Images is where images come from: *image.Store.
type Images interface {
	Get(ctx context.Context, name string) (image.Image, error)
}

// Kernels is where kernels come from: *kernel.Store.
type Kernels interface {
	Get(ctx context.Context, name string) (kernel.Kernel, error)
	Initramfs(ctx context.Context, k kernel.Kernel, agentBinary string, extra ...string) (path string, modules []string, err error)
}

// Options is what the capabilities stand on.
type Options struct {
	Paths       paths.Paths
	Images      Images
	Kernels     Kernels
	Network     hostnet.Network
	Nameservers func() []netip.Addr // for the guests' resolv.conf; nil: none
	Names       Names               // nil: VMs have no names in DNS
	Forwards    Forwards            // nil: no ports of the host lead into VMs
	AgentBinary string              // banger-agent for the guest's architecture
	Now         func() time.Time    // nil: time.Now
}

// All returns the capabilities of a VM in order of start. The order of the disks is part of it: the
// guest's first disk is the root.
func All(o Options) []Capability {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Nameservers == nil {
		o.Nameservers = func() []netip.Addr { return nil }
	}
	all := []Capability{&rootDisk{o}, &workDisk{o}, &modules{o}, &network{o}}
	if o.Names != nil {
		all = append(all, newNames(o))
	}
	if o.Forwards != nil {
		all = append(all, &ports{o})
	}
	return append(all, newSSHKeys(o), balloon{}, &agent{o})
}

// readNote fills note with what the capability noted; it stays as it is when there is nothing.
func readNote(v vm.VM, name string, note any) error {
	raw, ok := v.Notes[name]
	if !ok {
		return nil
	}
	if err := json.Unmarshal(raw, note); err != nil {
		return fmt.Errorf("note of %s in the row of VM %s: %w", name, v.Spec.Name, err)
	}
	return nil
}

// image returns the VM's image: the one its overlay was made over, also when the default is another one now.
func (o Options) image(ctx context.Context, v vm.VM) (image.Image, error) {
	note := rootNote{Image: v.Spec.Image}
	if err := readNote(v, rootDiskName, &note); err != nil {
		return image.Image{}, err
	}
	return o.Images.Get(ctx, note.Image)
}

// checkSpace refuses a new disk that could not be filled.
func checkSpace(what string, size int64, dir string) error {
	free, err := disk.FreeBytes(dir)
	if err != nil {
		return err
	}
	if size > free {
		return fault.New(fault.Precondition, "a %s of %s does not fit: %s are free in %s", what, vm.FormatSize(size), vm.FormatSize(free), dir).
			WithHint("make it smaller, or make room")
	}
	return nil
}

// changed is the fault for what a guest that was saved holds parts of in its memory, and which is another one now.
func changed(what string, v vm.VM) error {
	return fault.New(fault.Precondition, "%s was made anew since the memory of VM %s was saved", what, v.Spec.Name)
}

// missing is the fault for a disk that was made once and is not there any more. It is never made
// anew: an empty one in its place would look like lost work, and hide that the file may still be elsewhere.
func missing(what, path string, v vm.VM) error {
	return fault.New(fault.Precondition, "the %s of VM %s is missing: %s", what, v.Spec.Name, path).
		WithHint("put the file back, or delete the VM: banger vm delete %s", v.Spec.Name)
}
