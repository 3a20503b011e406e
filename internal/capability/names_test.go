package capability

import (
	"context"
	"errors"
	"fmt"
	"net/netip"
	"slices"
	"testing"

	"banger/internal/dns"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// registrar is a name server of nothing but memory.
type registrar struct {
	hosts  []dns.Host
	serves bool
	bridge netip.Prefix
}

func (r *registrar) Publish(hosts []dns.Host) { r.hosts = hosts }

func (r *registrar) ServeGuests(_ context.Context, bridge netip.Prefix) bool {
	r.bridge = bridge
	return r.serves
}

func (r *registrar) String() string {
	text := ""
	for _, h := range r.hosts {
		text += fmt.Sprint(h.Name, h.Addresses, h.Forward, ";")
	}
	return text
}

// gates is the ports of a host, of which some cannot be opened.
type gates struct {
	open  map[vm.ID][]vm.Port
	taken uint16
}

func (g *gates) Check(_ vm.ID, ports []vm.Port) error {
	if slices.ContainsFunc(ports, func(p vm.Port) bool { return p.Host.Port() == g.taken }) {
		return errors.New("taken")
	}
	return nil
}

func (g *gates) Set(id vm.ID, ports []vm.Port) error {
	if err := g.Check(id, ports); err != nil {
		return err
	}
	g.open[id] = ports
	return nil
}

func TestNamesAndPortsFollowTheVM(t *testing.T) {
	r, g := &registrar{serves: true}, &gates{open: map[vm.ID][]vm.Port{}, taken: 99}
	f := newFixture(t)
	f.Names, f.Forwards = r, g
	f.all = All(f.Options)
	ctx := t.Context()
	web, db := f.vm(t, "0a0b0c0d", "web"), f.vm(t, "0a0b0c0e", "db")
	db.IP, db.Spec.NAT = mustAddr("172.30.0.3"), false
	port, err := vm.ParsePort("8080:80")
	if err != nil {
		t.Fatal(err)
	}
	web.Spec.Ports = []vm.Port{port}
	b, err := f.up(ctx, &web)
	if err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(b.Guest.Nameservers, []string{"172.30.0.1"}) || r.bridge != netip.MustParsePrefix("172.30.0.1/16") {
		t.Errorf("the guest asks %v", b.Guest.Nameservers)
	}
	if !slices.Equal(g.open[web.ID], web.Spec.Ports) {
		t.Errorf("open are %v", g.open)
	}
	r.serves = false
	if b, err = f.up(ctx, &db); err != nil {
		t.Fatal(err)
	}
	if !slices.Equal(b.Guest.Nameservers, []string{"9.9.9.9"}) {
		t.Errorf("a guest that nobody serves asks %v", b.Guest.Nameservers)
	}
	both := "db[172.30.0.3 fdb1:a96e:2b47::ac1e:3] false;web[172.30.0.2 fdb1:a96e:2b47::ac1e:2] true;"
	if r.String() != both {
		t.Errorf("published %s", r)
	}
	if err := f.down(ctx, web); err != nil {
		t.Fatal(err)
	}
	if r.String() != "db[172.30.0.3 fdb1:a96e:2b47::ac1e:3] false;" || len(g.open[web.ID]) > 0 {
		t.Errorf("after a stop: %s, %v", r, g.open)
	}

	// A daemon that takes them up again, and answers guests when it knows all of them; what changes while a VM runs.
	r.bridge = netip.Prefix{}
	for _, c := range All(f.Options) {
		if again, ok := c.(Reattacher); ok && (c.Name() == "names" || c.Name() == "ports") {
			if err := errors.Join(again.Reattach(ctx, web), again.Reattach(ctx, db)); err != nil {
				t.Error(err)
			}
			db.Spec.NAT = true
			if err := c.(Updater).Update(ctx, db); err != nil {
				t.Error(err)
			}
			if s, ok := c.(Sweeper); ok {
				early := r.bridge
				if told, err := s.Sweep(ctx, nil); err != nil || len(told) > 0 || early.IsValid() || !r.bridge.IsValid() {
					t.Errorf("guests were answered at %s, are at %s: %q, %v", early, r.bridge, told, err)
				}
			}
		}
	}
	if r.String() != "db[172.30.0.3 fdb1:a96e:2b47::ac1e:3] true;web[172.30.0.2 fdb1:a96e:2b47::ac1e:2] true;" || len(g.open[web.ID]) != 1 {
		t.Errorf("taken up: %s, %v", r, g.open)
	}
}

// What a template's guest asks for names is in its shape, and no name server of the host's: those change with the network
// that the host is in.
func TestNameServersOfATemplate(t *testing.T) {
	r := &registrar{}
	f := newFixture(t)
	f.Names = r
	v := f.vm(t, "0a0b0c0d", "web")
	for _, serves := range []bool{true, false} {
		r.serves = serves
		b, shape := f.build(v), template.Shape{}
		b.Making = true
		for _, c := range All(f.Options) {
			s, ok := c.(Shaper)
			if !ok || c.Name() != networkName && c.Name() != "names" {
				continue
			}
			_, err := c.Up(t.Context(), v, b)
			if err := errors.Join(err, s.Shape(t.Context(), v, vmm.Caps{}, &shape)); err != nil {
				t.Fatal(err)
			}
		}
		if !slices.Equal(shape.Nameservers, b.Guest.Nameservers) || (len(shape.Nameservers) == 1) != serves {
			t.Errorf("served: %t: the template asks %v, its shape tells of %v", serves, b.Guest.Nameservers, shape.Nameservers)
		}
	}
}

// A template has no name, and a port that is taken is found before anything is made.
func TestNoNameForATemplateAndNoStartWithATakenPort(t *testing.T) {
	r, g := &registrar{serves: true}, &gates{open: map[vm.ID][]vm.Port{}, taken: 8080}
	f := newFixture(t)
	f.Names, f.Forwards = r, g
	f.all = All(f.Options)
	v := f.vm(t, "0a0b0c0d", "web")
	b := f.build(v)
	b.Making = true
	if _, err := newNames(f.Options).Up(t.Context(), v, b); err != nil || r.String() != "" || len(b.Guest.Nameservers) != 1 {
		t.Errorf("published %s, %v, %v", r, b.Guest.Nameservers, err)
	}
	port, err := vm.ParsePort("8080:80")
	if err != nil {
		t.Fatal(err)
	}
	v.Spec.Ports = []vm.Port{port}
	if _, err := (&ports{f.Options}).Up(t.Context(), v, b); err != nil || len(g.open) > 0 {
		t.Errorf("a template has ports: %v, %v", g.open, err)
	}
	if err := f.check(t.Context(), v); err == nil {
		t.Error("a taken port is not found")
	}
}
