package helper

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/vm"
)

// Every bridge has one table, by its own name: so bridges of several users do not touch each other's rules, and a
// bridge's are written as a whole, in one transaction that depends on nothing it would have to read before.
//
//	table inet banger0 {
//		set nat { type ipv4_addr; }
//		chain forward {
//			type filter hook forward priority filter; policy accept;
//			iifname "banger0" oifname "banger0" accept
//			iifname "banger0" ip daddr 169.254.0.0/16 reject
//			iifname "banger0" ct status dnat reject
//			iifname "banger0" ip saddr @nat accept
//			oifname "banger0" ct state established,related accept
//			iifname "banger0" reject
//			oifname "banger0" drop
//		}
//		chain input {
//			type filter hook input priority filter; policy accept;
//			iifname "banger0" ct state established,related accept
//			iifname "banger0" meta l4proto { icmp, ipv6-icmp } accept
//			iifname "banger0" ip daddr 172.30.0.1 { udp, tcp } dport 53 accept, and so in IPv6
//			iifname "banger0" reject
//		}
//		chain postrouting {
//			type nat hook postrouting priority srcnat; policy accept;
//			oifname != "banger0" ip saddr @nat masquerade
//		}
//	}
//
// Its second half is in the bridge family (see ports.go), as a table holds one family alone.

// dnsPort is where guests ask for names.
const dnsPort = hostnet.DNSPort

// ruleSet is what a bridge wants, beside what is found on the host while it is written.
type ruleSet struct {
	bridge  string
	address netip.Prefix // of the bridge
	rules   hostnet.Rules
	before  memory // of what was before a guest had NAT; kept in the table
	renew   bool   // begin with empty tables: slower, as chains are hooked anew

	filtersPorts bool // the kernel took the bridge family's half
}

func (s ruleSet) inet() *nftables.Table {
	return &nftables.Table{Name: s.bridge, Family: nftables.TableFamilyINet}
}

// replace queues the table as it should be, whatever there is of it.
func (s ruleSet) replace(c *nftables.Conn) error {
	table := s.inet()
	s.begin(c, table)
	nat := &nftables.Set{Table: table, Name: "nat", KeyType: nftables.TypeIPAddr}
	var sources [][]byte
	for _, g := range s.rules.Guests {
		if g.NAT && g.IP.IsValid() {
			sources = append(sources, g.IP.AsSlice())
		}
	}
	if err := addSet(c, nat, sources); err != nil {
		return err
	}
	if err := s.before.write(c, table); err != nil {
		return err
	}
	s.forward(c, table, nat)
	s.input(c, table)
	s.postrouting(c, table, nat)
	return nil
}

// begin queues the table itself. Its sets and chains are then emptied and filled again, which fails when another
// version of banger made them of other kinds: renew begins with an empty table.
func (s ruleSet) begin(c *nftables.Conn, table *nftables.Table) {
	c.AddTable(table)
	if s.renew {
		c.DelTable(table)
		c.AddTable(table)
	}
}

// setChunk is how many elements go into one message: an attribute of netlink holds 64 KiB.
const setChunk = 256

func addSet(c *nftables.Conn, set *nftables.Set, keys [][]byte) error {
	if err := c.AddSet(set, nil); err != nil {
		return fmt.Errorf("encode nftables set %s: %w", set.Name, err)
	}
	c.FlushSet(set)
	for len(keys) > 0 {
		n := min(len(keys), setChunk)
		elements := make([]nftables.SetElement, n)
		for i, k := range keys[:n] {
			elements[i].Key = k
		}
		if err := c.SetAddElements(set, elements); err != nil {
			return fmt.Errorf("encode nftables set %s: %w", set.Name, err)
		}
		keys = keys[n:]
	}
	return nil
}

// baseChain adds a chain that packets come through, with its rules.
func baseChain(c *nftables.Conn, chain *nftables.Chain, rules ...[]expr.Any) {
	accept := nftables.ChainPolicyAccept
	chain.Policy = &accept
	c.AddChain(chain)
	c.FlushChain(chain)
	for _, r := range rules {
		c.AddRule(&nftables.Rule{Table: chain.Table, Chain: chain, Exprs: r})
	}
}

func (s ruleSet) forward(c *nftables.Conn, table *nftables.Table, nat *nftables.Set) {
	in, out := s.in(), s.out()
	rules := [][]expr.Any{join(in, out, accept())} // passes here only with br_netfilter
	if !s.rules.LinkLocal {
		rules = append(rules, join(in, toLinkLocal(), reject()))
	}
	if !s.rules.HostServices { // published ports of the host's containers
		rules = append(rules, join(in, ctHas(expr.CtKeySTATUS, ctStatusDNAT), reject()))
	}
	rules = append(rules,
		join(in, fromSet(nat), accept()),
		join(out, answers(), accept()),
		join(in, reject()),
		join(out, drop()),
	)
	baseChain(c, &nftables.Chain{
		Table: table, Name: "forward", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter,
	}, rules...)
}

func (s ruleSet) input(c *nftables.Conn, table *nftables.Table) {
	in := s.in()
	rules := [][]expr.Any{
		join(in, answers(), accept()),
		join(in, l4proto(unix.IPPROTO_ICMP), accept()),
		join(in, l4proto(unix.IPPROTO_ICMPV6), accept()), // neighbour discovery too
	}
	for _, proto := range []byte{unix.IPPROTO_UDP, unix.IPPROTO_TCP} {
		rules = append(rules,
			join(in, toAddress(s.address.Addr()), toPort(proto, dnsPort), accept()),
			join(in, toAddress(vm.IPv6(s.address.Addr())), toPort(proto, dnsPort), accept()),
		)
	}
	rules = append(rules, join(in, reject()))
	if s.rules.HostServices {
		rules = nil
	}
	baseChain(c, &nftables.Chain{
		Table: table, Name: "input", Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookInput, Priority: nftables.ChainPriorityFilter,
	}, rules...)
}

func (s ruleSet) postrouting(c *nftables.Conn, table *nftables.Table, nat *nftables.Set) {
	elsewhere := device(expr.MetaKeyOIFNAME, expr.CmpOpNeq, s.bridge)
	baseChain(c, &nftables.Chain{
		Table: table, Name: "postrouting", Type: nftables.ChainTypeNAT,
		Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource,
	}, join(elsewhere, fromSet(nat), []expr.Any{&expr.Masq{}}))
}

func (s ruleSet) in() []expr.Any  { return device(expr.MetaKeyIIFNAME, expr.CmpOpEq, s.bridge) }
func (s ruleSet) out() []expr.Any { return device(expr.MetaKeyOIFNAME, expr.CmpOpEq, s.bridge) }

func join(parts ...[]expr.Any) []expr.Any {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

func accept() []expr.Any { return []expr.Any{&expr.Verdict{Kind: expr.VerdictAccept}} }
func drop() []expr.Any   { return []expr.Any{&expr.Verdict{Kind: expr.VerdictDrop}} }

// reject refuses so that a guest's program learns of it at once ("administratively prohibited") and need not wait.
func reject() []expr.Any {
	return []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMPX_UNREACH, Code: unix.NFT_REJECT_ICMPX_ADMIN_PROHIBITED}}
}

// ifname is a device's name as nftables compares it: padded with NULs.
func ifname(name string) []byte {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return padded
}

// device matches the name of the incoming or outgoing device.
func device(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: ifname(name)}}
}

func l4proto(proto byte) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{proto}},
	}
}

// toPort matches the destination port, at byte 2 of the headers of UDP and TCP.
func toPort(proto byte, port uint16) []expr.Any {
	return append(l4proto(proto),
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: binaryutil.BigEndian.PutUint16(port)},
	)
}

// header matches a family's packets and loads bytes of their header.
func header(family byte, offset, length uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{family}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
	}
}

// toAddress matches the destination: at byte 16 of an IPv4 header, 24 of an IPv6 one.
func toAddress(a netip.Addr) []expr.Any {
	load := header(unix.NFPROTO_IPV4, 16, 4)
	if a.Is6() {
		load = header(unix.NFPROTO_IPV6, 24, 16)
	}
	return append(load, &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: a.AsSlice()})
}

// fromSet matches IPv4 packets by their source, at byte 12 of the header.
func fromSet(set *nftables.Set) []expr.Any {
	return append(header(unix.NFPROTO_IPV4, 12, 4), &expr.Lookup{SourceRegister: 1, SetName: set.Name, SetID: set.ID})
}

// toLinkLocal matches IPv4 packets to 169.254.0.0/16, where clouds hand out a machine's credentials.
func toLinkLocal() []expr.Any {
	return append(header(unix.NFPROTO_IPV4, 16, 2), &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{169, 254}})
}

// ctStatusDNAT is IPS_DST_NAT of linux/netfilter/nf_conntrack_common.h: the connection's destination was changed.
const ctStatusDNAT = 1 << 5

// answers matches packets of connections that are known already.
func answers() []expr.Any {
	return ctHas(expr.CtKeySTATE, expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED)
}

// ctHas matches packets whose connection has one of these bits.
func ctHas(key expr.CtKey, bits uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Register: 1, Key: key},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: binaryutil.NativeEndian.PutUint32(bits), Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// sendBuffer holds a transaction with MaxGuests guests.
const sendBuffer = 4 << 20

func nftConn() (*nftables.Conn, error) {
	c, err := nftables.New(nftables.WithSockOptions(func(c *netlink.Conn) error {
		return errors.Join(c.SetWriteBuffer(sendBuffer), c.SetReadBuffer(sendBuffer))
	}))
	if err != nil {
		return nil, fmt.Errorf("talk to nftables: %w", err)
	}
	return c, nil
}

func commit(c *nftables.Conn) error {
	if err := c.Flush(); err != nil {
		return nftFault(err)
	}
	return nil
}

// nftFault tells a kernel without nftables from other failures.
func nftFault(err error) error {
	if errors.Is(err, unix.EPROTONOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EAFNOSUPPORT) {
		return fault.Wrap(fault.Precondition, err, "this kernel has no nftables").
			WithHint("load the kernel's modules: sudo modprobe nf_tables nft_masq nft_chain_nat nft_reject_inet")
	}
	return fmt.Errorf("set nftables rules: %w", err)
}

func macOf(g hostnet.Guest) net.HardwareAddr {
	mac, err := net.ParseMAC(g.MAC)
	if err != nil {
		return nil // a guest that has none yet
	}
	return mac
}
