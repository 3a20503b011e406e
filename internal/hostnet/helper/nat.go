package helper

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"slices"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hostnet"
)

// Every bridge has two base chains and a set of its own in the one table, so that bridges of several
// users do not touch each other's, and a bridge's chains can be written anew as a whole:
//
//	table inet banger {
//		set nat-banger0 { type ipv4_addr; }
//		chain forward-banger0 {
//			type filter hook forward priority filter; policy accept;
//			iifname "banger0" oifname "banger0" accept
//			iifname "banger0" ip daddr 169.254.0.0/16 drop
//			iifname "banger0" ip saddr @nat-banger0 accept
//			oifname "banger0" ct state established,related accept
//			iifname "banger0" drop
//			oifname "banger0" drop
//		}
//		chain postrouting-banger0 {
//			type nat hook postrouting priority srcnat; policy accept;
//			oifname != "banger0" ip saddr @nat-banger0 masquerade
//		}
//	}
const tableName = "banger"

var table = &nftables.Table{Name: tableName, Family: nftables.TableFamilyINet}

// natOf is what a bridge has in the table.
type natOf struct {
	bridge               string
	guests               *nftables.Set
	forward, postrouting *nftables.Chain
}

func newNAT(bridge string) natOf {
	accept := nftables.ChainPolicyAccept
	return natOf{
		bridge: bridge,
		guests: &nftables.Set{Table: table, Name: "nat-" + bridge, KeyType: nftables.TypeIPAddr},
		forward: &nftables.Chain{
			Table: table, Name: "forward-" + bridge, Type: nftables.ChainTypeFilter,
			Hooknum: nftables.ChainHookForward, Priority: nftables.ChainPriorityFilter, Policy: &accept,
		},
		postrouting: &nftables.Chain{
			Table: table, Name: "postrouting-" + bridge, Type: nftables.ChainTypeNAT,
			Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource, Policy: &accept,
		},
	}
}

// setNAT writes the bridge's rules anew and adds the guest to those with NAT or takes it away, in one
// transaction. Without the bridge there is nothing to switch off.
func setNAT(bridge string, guest netip.Addr, on bool, me owner) error {
	link, err := find(bridge)
	if err == nil && link == nil && !on {
		return nil
	}
	if err == nil {
		link, err = ourBridge(bridge, me)
	}
	if err == nil && on {
		err = checkGuest(link, guest)
	}
	if err == nil && on {
		err = forwardIPv4()
	}
	if err != nil {
		return err
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("talk to nftables: %w", err)
	}
	nat := newNAT(bridge)
	if err := errors.Join(nat.write(c), nat.change(c, guest, on)); err != nil {
		return err
	}
	return commit(c)
}

// change queues that the guest is in the bridge's set or not. What is not in the set cannot be deleted.
func (n natOf) change(c *nftables.Conn, guest netip.Addr, on bool) error {
	has, err := n.has(guest)
	if err != nil || has == on {
		return err
	}
	element := []nftables.SetElement{{Key: guest.AsSlice()}}
	if on {
		err = c.SetAddElements(n.guests, element)
	} else {
		err = c.SetDeleteElements(n.guests, element)
	}
	if err != nil {
		return fmt.Errorf("encode nftables set: %w", err)
	}
	return nil
}

// checkGuest refuses addresses outside the bridge's subnet.
func checkGuest(bridge netlink.Link, guest netip.Addr) error {
	addresses, err := hostnet.List(func() ([]netlink.Addr, error) { return netlink.AddrList(bridge, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("read the addresses of bridge %s: %w", bridge.Attrs().Name, err)
	}
	for _, a := range addresses {
		if a.IPNet.Contains(net.IP(guest.AsSlice())) && !a.IP.Equal(net.IP(guest.AsSlice())) {
			return nil
		}
	}
	return fault.New(fault.Usage, "guest %s is not in the subnet of bridge %s", guest, bridge.Attrs().Name)
}

// forwardIPv4 switches forwarding on; CAP_NET_ADMIN is enough for that.
func forwardIPv4() error {
	now, err := os.ReadFile(ipForward)
	if err == nil && bytes.Equal(bytes.TrimSpace(now), []byte("1")) {
		return nil
	}
	if err := os.WriteFile(ipForward, []byte("1\n"), 0); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot switch on IPv4 forwarding").
			WithHint("sudo sysctl -w net.ipv4.ip_forward=1")
	}
	return nil
}

// has tells whether a guest is in the bridge's set.
func (n natOf) has(guest netip.Addr) (bool, error) {
	c, err := nftables.New()
	if err != nil {
		return false, fmt.Errorf("talk to nftables: %w", err)
	}
	exists, _, err := n.inKernel(c)
	if err != nil || !exists {
		return false, err
	}
	sets, err := c.GetSets(table)
	if err != nil {
		return false, fmt.Errorf("read nftables sets: %w", err)
	}
	if !slices.ContainsFunc(sets, func(s *nftables.Set) bool { return s.Name == n.guests.Name }) {
		return false, nil
	}
	elements, err := c.GetSetElements(n.guests)
	if err != nil {
		return false, fmt.Errorf("read nftables set %s: %w", n.guests.Name, err)
	}
	return slices.ContainsFunc(elements, func(e nftables.SetElement) bool {
		return bytes.Equal(e.Key, guest.AsSlice())
	}), nil
}

// inKernel tells whether the table exists, and how many chains of other bridges are in it.
func (n natOf) inKernel(c *nftables.Conn) (exists bool, others int, err error) {
	tables, err := c.ListTablesOfFamily(table.Family)
	if err != nil {
		return false, 0, nftFault(err)
	}
	exists = slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == tableName })
	if !exists {
		return false, 0, nil
	}
	chains, err := c.ListChainsOfTableFamily(table.Family)
	if err != nil {
		return false, 0, nftFault(err)
	}
	for _, chain := range chains {
		if chain.Table.Name == tableName && chain.Name != n.forward.Name && chain.Name != n.postrouting.Name {
			others++
		}
	}
	return true, others, nil
}

// write queues the bridge's set and chains as they should be.
func (n natOf) write(c *nftables.Conn) error {
	c.AddTable(table)
	if err := c.AddSet(n.guests, nil); err != nil {
		return fmt.Errorf("encode nftables set: %w", err)
	}
	for _, chain := range []*nftables.Chain{n.forward, n.postrouting} {
		c.AddChain(chain)
		c.FlushChain(chain)
	}
	in, out := device(expr.MetaKeyIIFNAME, expr.CmpOpEq, n.bridge), device(expr.MetaKeyOIFNAME, expr.CmpOpEq, n.bridge)
	accept, drop := &expr.Verdict{Kind: expr.VerdictAccept}, &expr.Verdict{Kind: expr.VerdictDrop}
	rules := [][]expr.Any{
		slices.Concat(in, out, []expr.Any{accept}), // passes here only with br_netfilter
		slices.Concat(in, toLinkLocal(), []expr.Any{drop}),
		slices.Concat(in, n.fromGuest(), []expr.Any{accept}),
		slices.Concat(out, answers(), []expr.Any{accept}),
		slices.Concat(in, []expr.Any{drop}),
		slices.Concat(out, []expr.Any{drop}),
	}
	for _, r := range rules {
		c.AddRule(&nftables.Rule{Table: table, Chain: n.forward, Exprs: r})
	}
	elsewhere := device(expr.MetaKeyOIFNAME, expr.CmpOpNeq, n.bridge)
	c.AddRule(&nftables.Rule{
		Table: table, Chain: n.postrouting, Exprs: slices.Concat(elsewhere, n.fromGuest(), []expr.Any{&expr.Masq{}}),
	})
	return nil
}

// device matches the name of the incoming or outgoing device.
func device(key expr.MetaKey, op expr.CmpOp, name string) []expr.Any {
	padded := make([]byte, unix.IFNAMSIZ)
	copy(padded, name)
	return []expr.Any{&expr.Meta{Key: key, Register: 1}, &expr.Cmp{Op: op, Register: 1, Data: padded}}
}

// fromGuest matches IPv4 packets from a guest with NAT: the source address is at byte 12 of the header.
func (n natOf) fromGuest() []expr.Any {
	return append(ipv4Bytes(12, 4), &expr.Lookup{SourceRegister: 1, SetName: n.guests.Name, SetID: n.guests.ID})
}

// toLinkLocal matches IPv4 packets to 169.254.0.0/16, where clouds hand out a machine's credentials:
// the destination is at byte 16 of the header.
func toLinkLocal() []expr.Any {
	return append(ipv4Bytes(16, 2), &expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{169, 254}})
}

// ipv4Bytes matches IPv4 packets and loads bytes of their header.
func ipv4Bytes(offset, length uint32) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: 1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: 1, Data: []byte{unix.NFPROTO_IPV4}},
		&expr.Payload{DestRegister: 1, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: length},
	}
}

// answers matches packets of connections that are known already.
func answers() []expr.Any {
	mask := binaryutil.NativeEndian.PutUint32(expr.CtStateBitESTABLISHED | expr.CtStateBitRELATED)
	return []expr.Any{
		&expr.Ct{Register: 1, Key: expr.CtKeySTATE},
		&expr.Bitwise{SourceRegister: 1, DestRegister: 1, Len: 4, Mask: mask, Xor: make([]byte, 4)},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: 1, Data: make([]byte, 4)},
	}
}

// removeNAT takes the bridge's rules away, and the table with the last bridge's. Rules whose bridge
// is gone are dead, so anybody may take them away.
func removeNAT(bridge string, me owner) error {
	link, err := find(bridge)
	if err != nil {
		return err
	}
	if link != nil {
		if err := checkBridge(link, me); err != nil {
			return err
		}
	}
	c, err := nftables.New()
	if err != nil {
		return fmt.Errorf("talk to nftables: %w", err)
	}
	nat := newNAT(bridge)
	exists, others, err := nat.inKernel(c)
	if err != nil || !exists {
		return err
	}
	if others == 0 {
		c.DelTable(table)
		return commit(c)
	}
	if err := nat.write(c); err != nil { // what is deleted must exist
		return err
	}
	for _, chain := range []*nftables.Chain{nat.forward, nat.postrouting} {
		c.FlushChain(chain)
		c.DelChain(chain)
	}
	c.DelSet(nat.guests)
	return commit(c)
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
			WithHint("load the kernel's modules: sudo modprobe nf_tables nft_masq nft_chain_nat")
	}
	return fmt.Errorf("set nftables rules: %w", err)
}
