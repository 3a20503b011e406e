package dns

import (
	"net/netip"
	"strings"

	"github.com/miekg/dns"
)

// Origin is the zone that VMs have their names in.
const Origin = "vm."

// Lifetimes of answers, in seconds: short, because names come and go with VMs.
const (
	ttl         = 5
	negativeTTL = 1
)

// Host is a VM that has a name.
type Host struct {
	Name      string       // one label: "web" is found as web.vm
	Addresses []netip.Addr // IPv4 and IPv6
	// Forward lets the VM ask for names of the world through the forwarder. One that must not leave the host
	// could otherwise carry data out in the names that it asks for.
	Forward bool
}

// Zone is what is served: the zone vm with its hosts, and the reverse zones of the subnets that their
// addresses are in.
type Zone struct {
	Hosts   []Host
	Subnets []netip.Prefix
}

// table is a zone made ready for questions. It never changes.
type table struct {
	names   map[string]Host     // by name in lower case, "web.vm."
	pointer map[string]string   // "2.0.30.172.in-addr.arpa." to "web.vm."
	between map[string]bool     // names of no record of their own that have some below them
	forward map[netip.Addr]bool // who may ask the forwarder for anything
	origins []string            // of the zones: vm. and the reverse ones
	serial  uint32
}

func newTable(z Zone, serial uint32) *table {
	t := &table{
		names: map[string]Host{}, pointer: map[string]string{}, between: map[string]bool{}, forward: map[netip.Addr]bool{},
		origins: []string{Origin}, serial: serial,
	}
	for _, subnet := range z.Subnets {
		t.origins = append(t.origins, reverseOrigins(subnet)...)
	}
	for _, h := range z.Hosts {
		name := strings.ToLower(h.Name) + "." + Origin
		t.names[name] = h
		for _, a := range h.Addresses {
			if reverse, err := dns.ReverseAddr(a.String()); err == nil {
				t.pointer[reverse] = name
				t.addBetween(reverse)
			}
			t.forward[a.Unmap()] = h.Forward
		}
	}
	return t
}

// reverseOrigins returns the zones below in-addr.arpa or ip6.arpa that a subnet is made of: zones are cut between
// octets of IPv4 addresses and hex digits of IPv6 ones (RFC 1035 3.5, RFC 3596 2.5), so one that ends within an octet is several.
func reverseOrigins(subnet netip.Prefix) []string {
	unit := 8
	if subnet.Addr().Is6() {
		unit = 4
	}
	subnet = subnet.Masked()
	bits := (subnet.Bits() + unit - 1) / unit * unit
	labels := (subnet.Addr().BitLen() - bits) / unit // of the address, not of the zone
	var origins []string
	for a, n := subnet.Addr(), 1<<(bits-subnet.Bits()); n > 0; n-- {
		reverse, err := dns.ReverseAddr(a.String())
		if err != nil {
			return nil
		}
		for range labels {
			_, reverse, _ = strings.Cut(reverse, ".")
		}
		origins = append(origins, reverse)
		a = after(a, bits)
	}
	return origins
}

// after returns the first address of the next prefix of that length.
func after(a netip.Addr, bits int) netip.Addr {
	bytes := a.AsSlice()
	for i, carry := (bits-1)/8, 1<<(7-(bits-1)%8); i >= 0 && carry > 0; i-- {
		sum := int(bytes[i]) + carry
		bytes[i], carry = byte(sum), sum>>8
	}
	next, _ := netip.AddrFromSlice(bytes) // its length is right
	return next
}

// origin returns the zone that a name, in lower case, lies in; "" when none is ours.
func (t *table) origin(name string) string {
	for _, o := range t.origins {
		if name == o || strings.HasSuffix(name, "."+o) {
			return o
		}
	}
	return ""
}

// answer fills in the reply to a question about a name in one of the zones.
func (t *table) answer(m *dns.Msg, q dns.Question, origin string) {
	m.Authoritative = true
	name := strings.ToLower(q.Name)
	head := func(rrtype uint16) dns.RR_Header {
		return dns.RR_Header{Name: q.Name, Rrtype: rrtype, Class: dns.ClassINET, Ttl: ttl} // q.Name: in the case it was asked in
	}
	host, isHost := t.names[name]
	target, isPointer := t.pointer[name]
	wants := func(rrtype uint16) bool { return q.Qtype == rrtype || q.Qtype == dns.TypeANY }
	switch {
	case name == origin && wants(dns.TypeSOA):
		m.Answer = append(m.Answer, t.soa(q.Name, ttl))
	case name == origin && wants(dns.TypeNS): // the zone's own name: see RFC 6303 section 3
		m.Answer = append(m.Answer, &dns.NS{Hdr: head(dns.TypeNS), Ns: origin})
	case isHost:
		for _, a := range host.Addresses {
			switch a = a.Unmap(); {
			case a.Is4() && wants(dns.TypeA):
				m.Answer = append(m.Answer, &dns.A{Hdr: head(dns.TypeA), A: a.AsSlice()})
			case a.Is6() && wants(dns.TypeAAAA):
				m.Answer = append(m.Answer, &dns.AAAA{Hdr: head(dns.TypeAAAA), AAAA: a.AsSlice()})
			}
		}
	case isPointer && wants(dns.TypePTR):
		m.Answer = append(m.Answer, &dns.PTR{Hdr: head(dns.TypePTR), Ptr: target})
	}
	if len(m.Answer) > 0 {
		return
	}
	if name != origin && !isHost && !isPointer && !t.between[name] {
		m.Rcode = dns.RcodeNameError
	}
	m.Ns = append(m.Ns, t.soa(origin, negativeTTL))
}

// addBetween notes the names above this one, which then exist, though without records (RFC 8020).
func (t *table) addBetween(name string) {
	for {
		_, above, ok := strings.Cut(name, ".")
		if !ok || above == "" || t.between[above] {
			return
		}
		t.between[above] = true
		name = above
	}
}

func (t *table) soa(name string, lifetime uint32) dns.RR {
	return &dns.SOA{
		Hdr: dns.RR_Header{Name: name, Rrtype: dns.TypeSOA, Class: dns.ClassINET, Ttl: lifetime},
		Ns:  strings.ToLower(name), Mbox: "nobody.invalid.", Serial: t.serial,
		Refresh: 3600, Retry: 1200, Expire: 604800, Minttl: negativeTTL,
	}
}
