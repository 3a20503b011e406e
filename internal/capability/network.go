package capability

import (
	"context"
	"encoding/json"
	"fmt"
	"net/netip"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// mtu is that of the bridge, an ordinary Ethernet.
const mtu = 1500

const networkName = "network"

// network is one interface with a static address on the bridge, and NAT for those that want it.
type network struct{ o Options }

// networkNote outlives a stop, and with it the device: it says which one a VM has that runs, and no more.
type networkNote struct {
	TAP string `json:"tap"`
}

func (*network) Name() string       { return networkName }
func (*network) Wants(vm.Spec) bool { return true }

// checker is a network that can tell in advance whether it will be able to do its work.
type checker interface{ Check(context.Context) error }

var _ checker = (*hostnet.Client)(nil)

// Check finds a missing right to make devices, when the network can tell. The bridge is looked at by Up.
func (c *network) Check(ctx context.Context, _ vm.VM) error {
	if n, ok := c.o.Network.(checker); ok {
		return n.Check(ctx)
	}
	return nil
}

func (c *network) Up(ctx context.Context, v vm.VM, b *Build) (_ Note, err error) {
	gateway, err := c.o.Network.EnsureBridge(ctx)
	if err != nil {
		return nil, err
	}
	if b.Making {
		return c.upNobody(ctx, v, b)
	}
	if !gateway.Contains(v.IP) {
		return nil, fault.New(fault.Conflict, "address %s of VM %s is outside the bridge's subnet %s", v.IP, v.Spec.Name, gateway.Masked()).
			WithHint("set the subnet back in config.toml, or make the VM anew")
	}
	tap, err := c.o.Network.Attach(ctx, v.ID, guestOf(v))
	if err != nil {
		return nil, err
	}
	b.Machine.NICs = append(b.Machine.NICs, vmm.NIC{TAP: tap, MAC: v.MAC})
	b.Guest.Interfaces = append(b.Guest.Interfaces, &agentv1.Interface{
		Mac: v.MAC, Gateway: gateway.Addr().String(), Mtu: mtu,
		Addresses: []string{
			netip.PrefixFrom(v.IP, gateway.Bits()).String(),
			vm.IPv6Prefix(netip.PrefixFrom(v.IP, gateway.Bits())).String(),
		},
	})
	for _, a := range c.o.Nameservers() {
		b.Guest.Nameservers = append(b.Guest.Nameservers, a.String())
	}
	return json.Marshal(networkNote{TAP: tap})
}

// guestOf is a VM as the host's rules know it, without its device.
func guestOf(v vm.VM) hostnet.Guest {
	return hostnet.Guest{MAC: v.MAC, IP: v.IP, NAT: v.Spec.NAT, Isolated: v.Spec.Isolated}
}

// attachedGuest is guestOf a VM that runs, with the device it was given.
func attachedGuest(v vm.VM) (hostnet.Guest, error) {
	var note networkNote
	g := guestOf(v)
	if err := readNote(v, networkName, &note); err != nil {
		return g, err
	}
	g.TAP = note.TAP
	return g, nil
}

// upNobody makes the interface of a template: a guest that finds its device there, and reaches nothing.
func (c *network) upNobody(ctx context.Context, v vm.VM, b *Build) (Note, error) {
	tap, err := c.o.Network.Attach(ctx, v.ID, hostnet.Guest{})
	if err != nil {
		return nil, err
	}
	b.Machine.NICs = append(b.Machine.NICs, vmm.NIC{TAP: tap, MAC: v.MAC})
	b.Guest.Interfaces = append(b.Guest.Interfaces, &agentv1.Interface{Mac: v.MAC, Mtu: mtu})
	return json.Marshal(networkNote{TAP: tap})
}

// Shape tells that there is one interface.
func (*network) Shape(_ context.Context, _ vm.VM, _ vmm.Caps, s *template.Shape) error {
	s.Interfaces++
	return nil
}

func (c *network) Down(ctx context.Context, v vm.VM) error { return c.o.Network.Detach(ctx, v.ID) }

// Reattach makes sure of what a reboot of the host's firewall may have taken; the TAP device is in use.
func (c *network) Reattach(ctx context.Context, v vm.VM) error {
	if _, err := c.o.Network.EnsureBridge(ctx); err != nil {
		return err
	}
	return c.Update(ctx, v)
}

// Update changes what the VM may reach.
func (c *network) Update(ctx context.Context, v vm.VM) error {
	g, err := attachedGuest(v)
	if err == nil {
		_, err = c.o.Network.Attach(ctx, v.ID, g)
	}
	return err
}

// Sweep tells the network which devices VMs have. The others wait for VMs to come, or are removed.
func (c *network) Sweep(ctx context.Context, all []vm.VM) ([]string, error) {
	attached := map[vm.ID]hostnet.Guest{}
	for _, v := range all {
		if !v.State.HasProcess() && v.State != vm.Resuming && v.State != vm.Stopping { // a stop that goes on
			continue
		}
		g, err := attachedGuest(v)
		if err != nil {
			return nil, err
		}
		if g.TAP != "" {
			attached[v.ID] = g
		}
	}
	removed, err := c.o.Network.Settle(ctx, attached)
	var told []string
	for _, tap := range removed {
		told = append(told, fmt.Sprintf("TAP device %s belonged to no running VM: removed", tap))
	}
	return told, err
}
