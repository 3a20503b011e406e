package helper

import (
	"errors"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"banger/internal/vm"
)

// The bridge's ports: a guest sends with its own addresses alone, so that what is allowed by address is allowed to
// that guest and nobody else, and no sibling's traffic is drawn away. Isolated guests see no siblings.
//
//	table bridge banger0 {
//		set taps { type ifname; }
//		set macs { type ifname . ether_addr; }
//		set sources { type ifname . ipv4_addr; }
//		set sources6 { type ifname . ipv6_addr; }
//		set isolated { type ifname; }
//		chain guest {
//			iifname . ether saddr != @macs drop
//			ether type arp arp saddr ip 0.0.0.0 accept
//			ether type arp iifname . arp saddr ip @sources accept
//			ether type ip iifname . ip saddr @sources accept
//			ether type ip6 icmpv6 type nd-router-advert drop, and so nd-redirect
//			ether type ip6 icmpv6 type nd-neighbor-advert icmpv6 taddr != fe80::/16 iifname . icmpv6 taddr != @sources6 drop
//			ether type ip6 ip6 saddr :: accept, and so fe80::/16
//			ether type ip6 iifname . ip6 saddr @sources6 accept
//			drop
//		}
//		chain prerouting {
//			type filter hook prerouting priority filter; policy accept;
//			iifname @taps jump guest
//		}
//		chain forward {
//			type filter hook forward priority filter; policy accept;
//			iifname @isolated drop
//			oifname @isolated drop
//		}
//	}
//
// The kernel's "meta ibrname" would need a module of its own; the names of the TAP devices say as much.

// bridgeFilter is the priority "filter" in the bridge family: NF_BR_PRI_FILTER_BRIDGED of
// linux/netfilter_bridge.h.
const bridgeFilter = nftables.ChainPriority(-200)

func (s ruleSet) ports() *nftables.Table {
	return &nftables.Table{Name: s.bridge, Family: nftables.TableFamilyBridge}
}

// portSets are the sets of the bridge family's table.
type portSets struct{ taps, macs, sources, sources6, isolated *nftables.Set }

// replacePorts queues the bridge family's table whatever there is of it.
func (s ruleSet) replacePorts(c *nftables.Conn) error {
	table := s.ports()
	s.begin(c, table)
	sets, err := s.addPortSets(c, table)
	if err != nil {
		return err
	}
	guest := &nftables.Chain{Table: table, Name: "guest"}
	c.AddChain(guest)
	c.FlushChain(guest)
	for _, r := range sets.guestRules() {
		c.AddRule(&nftables.Rule{Table: table, Chain: guest, Exprs: r})
	}
	priority := bridgeFilter
	baseChain(c, &nftables.Chain{
		Table: table, Name: "prerouting", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookPrerouting, Priority: &priority,
	}, join(nameIn(expr.MetaKeyIIFNAME, sets.taps), []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: guest.Name}}))
	baseChain(c, &nftables.Chain{
		Table: table, Name: "forward", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: &priority,
	},
		join(nameIn(expr.MetaKeyIIFNAME, sets.isolated), drop()),
		join(nameIn(expr.MetaKeyOIFNAME, sets.isolated), drop()),
	)
	return nil
}

func (s ruleSet) addPortSets(c *nftables.Conn, table *nftables.Table) (portSets, error) {
	var taps, macs, sources, sources6, isolated [][]byte
	for _, g := range s.rules.Guests {
		name := ifname(g.TAP)
		taps = append(taps, name)
		if g.Isolated {
			isolated = append(isolated, name)
		}
		if mac := macOf(g); mac != nil {
			macs = append(macs, slices.Concat(name, mac, []byte{0, 0})) // parts of a key are padded to four bytes
		}
		if g.IP.IsValid() {
			sources = append(sources, slices.Concat(name, g.IP.AsSlice()))
			sources6 = append(sources6, slices.Concat(name, vm.IPv6(g.IP).AsSlice()))
		}
	}
	with := func(name string, second nftables.SetDatatype) *nftables.Set {
		return &nftables.Set{
			Table: table, Name: name, Concatenation: true, KeyType: nftables.MustConcatSetType(nftables.TypeIFName, second),
		}
	}
	sets := portSets{
		taps: &nftables.Set{Table: table, Name: "taps", KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian},
		macs: with("macs", nftables.TypeEtherAddr), sources: with("sources", nftables.TypeIPAddr), sources6: with("sources6", nftables.TypeIP6Addr),
		isolated: &nftables.Set{Table: table, Name: "isolated", KeyType: nftables.TypeIFName, KeyByteOrder: binaryutil.NativeEndian},
	}
	return sets, errors.Join(
		addSet(c, sets.taps, taps), addSet(c, sets.macs, macs), addSet(c, sets.sources, sources),
		addSet(c, sets.sources6, sources6), addSet(c, sets.isolated, isolated),
	)
}

// guestRules are what a frame from a guest must pass. Offsets are those of the headers of Ethernet, ARP
// (RFC 826, for IPv4 over Ethernet), IPv4 and IPv6.
func (p portSets) guestRules() [][]expr.Any {
	const (
		etherSource  = 6
		arpSender    = 14
		ipv4Source   = 12
		ipv6Source   = 8
		ndTarget     = 8 // of a neighbour advertisement (RFC 4861 4.4), from its ICMPv6 header on
		ipv4Len      = 4
		ipv6Len      = 16
		linkLocalLen = 2 // of fe80::/16: nobody uses other link-local prefixes
	)
	network := func(offset, length uint32) *expr.Payload {
		return &expr.Payload{Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length}
	}
	is := func(load *expr.Payload, value ...byte) []expr.Any {
		load.DestRegister = 1
		return []expr.Any{load, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: value}}
	}
	target := func(length uint32) *expr.Payload {
		return &expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: ndTarget, Len: length}
	}
	notLinkLocal := []expr.Any{target(linkLocalLen), &expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: []byte{0xfe, 0x80}}}
	mac := &expr.Payload{Base: expr.PayloadBaseLLHeader, Offset: etherSource, Len: 6}
	return [][]expr.Any{
		join(together(mac, p.macs, true), drop()),
		join(etherType(unix.ETH_P_ARP), is(network(arpSender, ipv4Len), make([]byte, ipv4Len)...), accept()),
		join(etherType(unix.ETH_P_ARP), together(network(arpSender, ipv4Len), p.sources, false), accept()),
		join(etherType(unix.ETH_P_IP), together(network(ipv4Source, ipv4Len), p.sources, false), accept()),
		// Who says that he is a router would have the host's and the siblings' IPv6; who says that he has somebody's
		// address, what is sent there. The source of such a message proves nothing: it may be link-local.
		join(neighbourMessage(routerAdvert), drop()),
		join(neighbourMessage(redirect), drop()),
		join(neighbourMessage(neighbourAdvert), notLinkLocal, together(target(ipv6Len), p.sources6, true), drop()),
		join(etherType(unix.ETH_P_IPV6), is(network(ipv6Source, ipv6Len), make([]byte, ipv6Len)...), accept()),
		join(etherType(unix.ETH_P_IPV6), is(network(ipv6Source, linkLocalLen), 0xfe, 0x80), accept()),
		join(etherType(unix.ETH_P_IPV6), together(network(ipv6Source, ipv6Len), p.sources6, false), accept()),
		drop(),
	}
}

// ICMPv6 types of neighbour discovery (RFC 4861 4.2, 4.4, 4.5).
const (
	routerAdvert    = 134
	neighbourAdvert = 136
	redirect        = 137
)

// neighbourMessage matches IPv6 frames with an ICMPv6 message of this type, whatever headers stand before it. One in
// fragments is not seen, and not taken by hosts either (RFC 6980).
func neighbourMessage(kind byte) []expr.Any {
	return join(etherType(unix.ETH_P_IPV6), l4proto(unix.IPPROTO_ICMPV6), []expr.Any{
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 0, Len: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{kind}},
	})
}

func etherType(t uint16) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyPROTOCOL, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(t)},
	}
}

// nameIn matches a device by its name.
func nameIn(key expr.MetaKey, set *nftables.Set) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID}}
}

// together matches the incoming device and bytes of the frame as one key; with invert, those not in the set.
func together(load *expr.Payload, set *nftables.Set, invert bool) []expr.Any {
	// A register of 16 bytes takes the name, and the four-byte registers that follow it the bytes.
	load.DestRegister = unix.NFT_REG32_00 + unix.IFNAMSIZ/4
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: unix.NFT_REG32_00}, load,
		&expr.Lookup{SourceRegister: unix.NFT_REG32_00, SetName: set.Name, SetID: set.ID, Invert: invert},
	}
}
