package capability

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"

	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/image"
	"banger/internal/paths"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// plainDirs hold file systems of their own making, which do not work on an overlayfs.
var plainDirs = []string{"/var/lib/docker", "/var/lib/containerd"}

// fastArgs are kernel arguments of a guest with fast units: a console without the kernel's chatter, which
// costs an exit a byte, and no BPF security module, to which systemd would attach a program for a second.
var fastArgs = []string{"quiet", "lsm=landlock,lockdown,yama,apparmor"}

// agent is who the guest is, and the initramfs that tells it so.
type agent struct{ o Options }

type agentNote struct {
	MachineID string `json:"machine_id"`
}

func (*agent) Name() string       { return "agent-config" }
func (*agent) Wants(vm.Spec) bool { return true }

func (c *agent) Check(context.Context, vm.VM) error {
	if _, err := os.Stat(c.o.AgentBinary); err != nil {
		return fault.Wrap(fault.Precondition, err, "the agent for the guest is missing").
			WithHint("build and install all of banger: make install")
	}
	return nil
}

// templateHostname is short: to cut off a file that becomes shorter is what takes a clone's file system longest.
const templateHostname = "t"

func (c *agent) Up(ctx context.Context, v vm.VM, b *Build) (Note, error) {
	note := agentNote{MachineID: guest.NewMachineID()}
	if err := readNote(v, c.Name(), &note); err != nil {
		return nil, err
	}
	b.Guest.Hostname, b.Guest.MachineId, b.Guest.UnixNanos = v.Spec.Name, note.MachineID, c.o.Now().UnixNano()
	if b.Making {
		b.Guest.Hostname = templateHostname
	}
	if v.Spec.Units != vm.UnitsStock {
		b.Machine.Cmdline = append(b.Machine.Cmdline, fastArgs...)
	}
	if b.Restored {
		return json.Marshal(note)
	}
	if err := c.initramfs(ctx, v, b); err != nil {
		return nil, err
	}
	return json.Marshal(note)
}

// initramfs writes what the guest's init needs to boot: the modules, and the guest config that is whole now.
func (c *agent) initramfs(ctx context.Context, v vm.VM, b *Build) error {
	img, err := c.o.image(ctx, v)
	if err != nil {
		return err
	}
	k, err := c.o.Kernels.Get(ctx, v.Spec.Kernel)
	if err != nil {
		return err
	}
	var extra []string
	if b.Caps.Channel == "vsock" {
		extra = []string{"vmw_vsock_virtio_transport"}
	}
	base, modules, err := c.o.Kernels.Initramfs(ctx, k, c.o.AgentBinary, extra...)
	if err != nil {
		return err
	}
	g := b.Guest
	g.Modules, g.PlainDirs = modules, plainDirs
	g.MaskedUnits = masks(v.Spec.Units, img)
	if b.Caps.Channel == "vsock" {
		g.ChannelVsockPort = vmm.VsockPort
	} else {
		g.ChannelPort = vmm.ChannelPort
	}
	b.Machine.Initramfs = paths.VMInitramfs
	return guest.WriteInitramfs(filepath.Join(b.Machine.Dir, paths.VMInitramfs), base, g)
}

// masks returns the units to mask. Mounts of disks that are not there are masked for everybody.
func masks(units vm.Units, img image.Image) []string {
	switch {
	case units == vm.UnitsStock:
		return []string{"home.mount", "var.mount"}
	case img.MaskedUnits != nil:
		return *img.MaskedUnits
	}
	return guest.DefaultMasks()
}

// Down removes the initramfs: it holds the private host key and is written anew by every start.
func (c *agent) Down(_ context.Context, v vm.VM) error {
	err := os.Remove(filepath.Join(c.o.Paths.VM(v.ID), paths.VMInitramfs))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// GuestReady sets the guest's clock and removes the initramfs, which the guest has read.
func (c *agent) GuestReady(ctx context.Context, v vm.VM, running vmm.Running) error {
	client := guest.NewClient(running.DialGuest)
	defer client.Close()
	if _, err := client.SetClock(ctx, c.o.Now, guest.Unknown); err != nil {
		return err
	}
	return c.Down(ctx, v)
}
