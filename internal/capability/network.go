package capability

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"strings"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/paths"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// mtu is that of the bridge, an ordinary Ethernet.
const mtu = 1500

// network is one interface with a static address on the bridge, and NAT for those that want it.
type network struct{ o Options }

type networkNote struct {
	TAP string `json:"tap"`
}

func (*network) Name() string       { return "network" }
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
		return nil, c.upNobody(ctx, v, b)
	}
	if !gateway.Contains(v.IP) {
		return nil, fault.New(fault.Conflict, "address %s of VM %s is outside the bridge's subnet %s", v.IP, v.Spec.Name, gateway.Masked()).
			WithHint("set the subnet back in config.toml, or make the VM anew")
	}
	tap := paths.TAP(v.ID)
	if err := c.o.Network.AddTAP(ctx, tap); err != nil {
		return nil, err
	}
	if err := c.o.Network.SetNAT(ctx, v.IP, v.Spec.NAT); err != nil {
		return nil, errors.Join(err, c.o.Network.DeleteTAP(context.WithoutCancel(ctx), tap))
	}
	b.Machine.NICs = append(b.Machine.NICs, vmm.NIC{TAP: tap, MAC: v.MAC})
	b.Guest.Interfaces = append(b.Guest.Interfaces, &agentv1.Interface{
		Mac: v.MAC, Addresses: []string{netip.PrefixFrom(v.IP, gateway.Bits()).String()}, Gateway: gateway.Addr().String(), Mtu: mtu,
	})
	for _, a := range c.o.Nameservers() {
		b.Guest.Nameservers = append(b.Guest.Nameservers, a.String())
	}
	return json.Marshal(networkNote{TAP: tap})
}

// upNobody makes the interface of a template: a guest that finds its device there, and nothing else.
func (c *network) upNobody(ctx context.Context, v vm.VM, b *Build) error {
	tap := paths.TAP(v.ID)
	if err := c.o.Network.AddTAP(ctx, tap); err != nil {
		return err
	}
	b.Machine.NICs = append(b.Machine.NICs, vmm.NIC{TAP: tap, MAC: v.MAC})
	b.Guest.Interfaces = append(b.Guest.Interfaces, &agentv1.Interface{Mac: v.MAC, Mtu: mtu})
	return nil
}

// Shape tells that there is one interface.
func (*network) Shape(_ context.Context, _ vm.VM, _ vmm.Caps, s *template.Shape) error {
	s.Interfaces++
	return nil
}

func (c *network) Down(ctx context.Context, v vm.VM) error {
	var nat error
	if v.IP.IsValid() {
		nat = c.o.Network.SetNAT(ctx, v.IP, false)
	}
	return errors.Join(nat, c.o.Network.DeleteTAP(ctx, paths.TAP(v.ID)))
}

// Reattach makes sure of what a reboot of the host's firewall may have taken; the TAP device is in use.
func (c *network) Reattach(ctx context.Context, v vm.VM) error {
	if _, err := c.o.Network.EnsureBridge(ctx); err != nil {
		return err
	}
	return c.o.Network.SetNAT(ctx, v.IP, v.Spec.NAT)
}

// Sweep removes the TAP devices of VMs that do not run.
func (c *network) Sweep(ctx context.Context, all []vm.VM) ([]string, error) {
	taps, err := c.o.Network.ListTAPs(ctx)
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, v := range all {
		if v.State.HasProcess() || v.State == vm.Resuming || v.State == vm.Stopping { // a stop that goes on
			used[paths.TAP(v.ID)] = true
		}
	}
	var told []string
	var errs []error
	for _, tap := range taps {
		if used[tap] || !strings.HasPrefix(tap, paths.TAPPrefix) {
			continue
		}
		if err := c.o.Network.DeleteTAP(ctx, tap); err != nil {
			errs = append(errs, err)
			continue
		}
		told = append(told, fmt.Sprintf("TAP device %s belonged to no running VM: removed", tap))
	}
	return told, errors.Join(errs...)
}
