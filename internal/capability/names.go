package capability

import (
	"cmp"
	"context"
	"fmt"
	"net/netip"
	"slices"
	"sync"

	"banger/internal/dns"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// Names is where the names of VMs are served.
type Names interface {
	// Publish makes these the hosts that have a name.
	Publish(hosts []dns.Host)
	// ServeGuests answers guests on the address of their bridge, and tells whether it does. It may be asked again.
	ServeGuests(ctx context.Context, bridge netip.Prefix) bool
}

// names gives a VM its name in DNS from its start to its stop, and tells it whom to ask for others.
type names struct {
	o Options

	mu    sync.Mutex
	hosts map[vm.ID]dns.Host
}

func newNames(o Options) *names { return &names{o: o, hosts: map[vm.ID]dns.Host{}} }

func (*names) Name() string                       { return "names" }
func (*names) Wants(vm.Spec) bool                 { return true }
func (*names) Check(context.Context, vm.VM) error { return nil }

// Up comes after the network's. A guest whose bridge nobody serves names on keeps the servers that the network gave it.
func (c *names) Up(ctx context.Context, v vm.VM, b *Build) (Note, error) {
	servers, err := c.servers(ctx, b.Guest.GetNameservers())
	if err != nil {
		return nil, err
	}
	b.Guest.Nameservers = servers
	if !b.Making { // a template has no name
		c.add(v)
	}
	return nil, nil
}

// Shape tells the name servers that a template has in its resolv.conf, for its clones need not write them then: ours, or
// none. Those of the host change with the network it is in, and no VM should have to boot for that.
func (c *names) Shape(ctx context.Context, _ vm.VM, _ vmm.Caps, s *template.Shape) (err error) {
	s.Nameservers, err = c.servers(ctx, s.Nameservers)
	return err
}

// servers are ours on the bridge, or else those.
func (c *names) servers(ctx context.Context, those []string) ([]string, error) {
	gateway, err := c.o.Network.EnsureBridge(ctx)
	if err != nil {
		return nil, err
	}
	if c.o.Names.ServeGuests(ctx, gateway) {
		return []string{gateway.Addr().String()}, nil
	}
	return those, nil
}

func (c *names) Down(_ context.Context, v vm.VM) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.hosts[v.ID]; ok {
		delete(c.hosts, v.ID)
		c.publish()
	}
	return nil
}

// Update follows whether the VM may ask for names of the world.
func (c *names) Update(_ context.Context, v vm.VM) error {
	c.add(v)
	return nil
}

// Reattach gives the VM its name again, which went with an earlier daemon.
func (c *names) Reattach(_ context.Context, v vm.VM) error {
	c.add(v)
	return nil
}

// Sweep removes nothing. It comes when all VMs that run have their names again: guests that were answered before would be
// told that the others have none.
func (c *names) Sweep(ctx context.Context, _ []vm.VM) ([]string, error) {
	c.mu.Lock()
	named := len(c.hosts)
	c.mu.Unlock()
	if named == 0 {
		return nil, nil
	}
	gateway, err := c.o.Network.EnsureBridge(ctx)
	if err != nil {
		return nil, fmt.Errorf("serve names to guests again: %w", err)
	}
	c.o.Names.ServeGuests(ctx, gateway)
	return nil, nil
}

func (c *names) add(v vm.VM) {
	h := dns.Host{Name: v.Spec.Name, Forward: v.Spec.NAT}
	for _, a := range []netip.Addr{v.IP, v.IPv6()} {
		if a.IsValid() {
			h.Addresses = append(h.Addresses, a)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.hosts[v.ID] = h
	c.publish()
}

// publish tells all hosts; mu is held, so that the last word is the newest.
func (c *names) publish() {
	all := make([]dns.Host, 0, len(c.hosts))
	for _, h := range c.hosts {
		all = append(all, h)
	}
	slices.SortFunc(all, func(a, b dns.Host) int { return cmp.Compare(a.Name, b.Name) })
	c.o.Names.Publish(all)
}
