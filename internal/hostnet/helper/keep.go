package helper

import (
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"slices"
	"sync"
	"time"

	"github.com/google/nftables"
	mdnetlink "github.com/mdlayher/netlink"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hostnet"
)

// How often others' changes are followed.
const (
	watchSettle = 200 * time.Millisecond // after a change, until the rest of it is there too
	watchPause  = 2 * time.Second        // after we had to mend something
)

// keeper holds a bridge's rules as they were asked for, also when a firewall comes, reloads or flushes everything.
type keeper struct {
	log *slog.Logger

	mu      sync.Mutex
	bridge  string // "" while there is nothing to keep
	me      owner
	rules   hostnet.Rules
	before  memory // of forwarding: the table that holds it may be flushed
	watched bool

	filtersPorts bool // the kernel took the bridge family's half
}

// set makes the bridge's rules these, and keeps them so.
func (k *keeper) set(bridge string, rules hostnet.Rules, me owner) (hostnet.Response, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	link, err := find(bridge)
	if err == nil && link == nil && len(rules.Guests) == 0 {
		return hostnet.Response{}, k.clear(bridge, me)
	}
	if err != nil {
		return hostnet.Response{}, err
	}
	response, err := k.apply(bridge, rules, me)
	if err != nil {
		return hostnet.Response{}, err
	}
	k.bridge, k.rules, k.me = bridge, rules, me
	if !k.watched {
		k.watched = true
		k.watch()
	}
	return response, nil
}

// remove takes the bridge's rules away; those of a bridge that is gone are dead, so anybody may take them away.
func (k *keeper) remove(bridge string, me owner) error {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.clear(bridge, me)
}

func (k *keeper) clear(bridge string, me owner) error {
	link, err := find(bridge)
	if err == nil && link != nil {
		err = checkBridge(link, me)
	}
	if err != nil {
		return err
	}
	k.bridge = ""
	return k.removeRules(bridge)
}

// watch follows changes of the packet filter for as long as the process lives.
func (k *keeper) watch() {
	conn, err := mdnetlink.Dial(unix.NETLINK_NETFILTER, &mdnetlink.Config{Groups: 1 << (unix.NFNLGRP_NFTABLES - 1)})
	if err != nil {
		k.log.Warn("changes of other firewalls are not followed", "reason", err)
		return
	}
	changes := make(chan struct{}, 1)
	go func() {
		defer close(changes)
		for {
			// More changes than the socket holds are a change too.
			if _, err := conn.Receive(); err != nil && !errors.Is(err, unix.ENOBUFS) {
				k.log.Warn("changes of other firewalls are followed no more", "reason", err)
				return
			}
			select {
			case changes <- struct{}{}:
			default:
			}
		}
	}()
	go func() {
		for range changes {
			time.Sleep(watchSettle)
			if k.mend() {
				time.Sleep(watchPause)
			}
		}
	}()
}

// mend makes the rules again what they are to be, and tells whether they were not.
func (k *keeper) mend() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.bridge == "" || len(k.rules.Guests) == 0 {
		return false
	}
	changed, err := k.mendRules()
	if err != nil {
		k.log.Warn("the packet filter is not as it should be", "bridge", k.bridge, "reason", err)
		return true
	}
	if changed {
		k.log.Info("the packet filter was changed by others: mended", "bridge", k.bridge)
	}
	return changed
}

// mendRules writes what others took away.
func (k *keeper) mendRules() (bool, error) {
	bridge, rules := k.bridge, k.rules
	c, err := nftConn()
	if err != nil {
		return false, err
	}
	_, chains, err := listAll(c)
	if err != nil {
		return false, err
	}
	on, err := forwards()
	if err != nil {
		return false, err
	}
	has := func(family nftables.TableFamily) bool {
		return slices.ContainsFunc(chains, func(ch *nftables.Chain) bool {
			return ch.Table.Name == bridge && ch.Table.Family == family && ch.Name == "forward"
		})
	}
	lost := !has(nftables.TableFamilyINet) || k.filtersPorts && !has(nftables.TableFamilyBridge)
	if lost || rules.AnyNAT() && !on {
		_, err := k.apply(bridge, rules, k.me)
		return true, err
	}
	r, err := others{bridge, rules, nfCall()}.settle(c)
	return r.changed, err
}

// apply makes a bridge's rules these.
func (k *keeper) apply(bridge string, rules hostnet.Rules, me owner) (hostnet.Response, error) {
	link, err := ourBridge(bridge, me)
	if err != nil {
		return hostnet.Response{}, err
	}
	s := ruleSet{bridge: bridge, before: k.before}
	if s.address, err = addressOf(link); err != nil {
		return hostnet.Response{}, err
	}
	if s.rules, err = checkGuests(rules, s.address, bridge, me); err != nil {
		return hostnet.Response{}, err
	}
	if len(s.rules.Guests) == 0 {
		return hostnet.Response{}, k.removeRules(bridge)
	}
	response, err := s.apply()
	k.before, k.filtersPorts = s.before, s.filtersPorts
	return response, err
}

func (s *ruleSet) apply() (response hostnet.Response, err error) {
	c, err := nftConn()
	if err != nil {
		return response, err
	}
	tables, chains, err := listAll(c)
	if err != nil {
		return response, err
	}
	if s.before == nil {
		if s.before, err = recall(c, tables, s.bridge); err != nil {
			return response, err
		}
	}
	on, err := forwards()
	if err != nil {
		return response, err
	}
	before := s.before
	switch {
	case !s.rules.AnyNAT():
		s.before = nil
	case before == nil && !on:
		s.before = remember(chains)
	}
	if response.Notices, err = s.write(c, tables, chains); errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY) || errors.Is(err, unix.EINVAL) {
		s.renew = true
		response.Notices, err = s.write(c, tables, chains)
	}
	if err != nil {
		return response, err
	}
	switch {
	case s.rules.AnyNAT() && !on:
		err = forward(true)
	case !s.rules.AnyNAT() && before != nil:
		err = before.putBack(c, s.bridge, tables, chains)
	}
	if err != nil {
		return response, err
	}
	r, err := others{s.bridge, s.rules, nfCall()}.settle(c)
	response.Opened, response.Notices = r.opened, append(response.Notices, r.notices...)
	return response, err
}

// write makes both tables what they are to be: first who may send as whom.
func (s *ruleSet) write(c *nftables.Conn, tables []*nftables.Table, chains []*nftables.Chain) ([]string, error) {
	notices, err := s.writePorts(c)
	if err == nil {
		err = s.replace(c)
	}
	if err == nil {
		forgetLegacy(c, s.bridge, tables, chains)
		err = commit(c)
	}
	return notices, err
}

// writePorts filters the bridge's ports. A kernel that cannot is told, and refused when a guest is to be isolated.
func (s *ruleSet) writePorts(c *nftables.Conn) ([]string, error) {
	if err := s.replacePorts(c); err != nil {
		return nil, err
	}
	err := c.Flush()
	s.filtersPorts = err == nil
	if err == nil {
		return nil, nil
	}
	missing := errors.Is(err, unix.EAFNOSUPPORT) || errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.EPROTONOSUPPORT)
	if !missing {
		return nil, nftFault(err)
	}
	if slices.ContainsFunc(s.rules.Guests, func(g hostnet.Guest) bool { return g.Isolated }) {
		return nil, fault.Wrap(fault.Precondition, err, "this kernel cannot isolate VMs: it filters no bridged packets").
			WithHint("use a kernel with CONFIG_NF_TABLES_BRIDGE, or VMs that are not isolated")
	}
	return []string{"this kernel filters no bridged packets (CONFIG_NF_TABLES_BRIDGE): a VM can use a sibling's address"}, nil
}

// removeRules takes away all of a bridge's rules, here and in other firewalls, and puts IPv4 forwarding back.
func (k *keeper) removeRules(bridge string) error {
	c, err := nftConn()
	if err != nil {
		return err
	}
	tables, chains, err := listAll(c)
	if fault.KindOf(err) == fault.Precondition {
		return nil // a kernel without nftables has no rules
	}
	if err != nil {
		return err
	}
	before := k.before
	if before == nil {
		if before, err = recall(c, tables, bridge); err != nil {
			return err
		}
	}
	if before != nil { // first: when we die in between, the memory is still there
		if err := before.putBack(c, bridge, tables, chains); err != nil {
			return err
		}
		k.before = nil
	}
	for _, t := range tables {
		if t.Name == bridge && (t.Family == nftables.TableFamilyINet || t.Family == nftables.TableFamilyBridge) {
			c.AddTable(t) // somebody may have deleted it meanwhile
			c.DelTable(t)
		}
	}
	forgetLegacy(c, bridge, tables, chains)
	if err := commit(c); err != nil {
		return err
	}
	_, err = others{bridge: bridge}.settle(c)
	return err
}

// forgetLegacy queues the removal of a bridge's chains from the table that all bridges shared before protocol version 2.
func forgetLegacy(c *nftables.Conn, bridge string, tables []*nftables.Table, chains []*nftables.Chain) {
	old := &nftables.Table{Name: legacyTable, Family: nftables.TableFamilyINet}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == old.Name && t.Family == old.Family }) {
		return
	}
	left := false
	for _, ch := range chains {
		if ch.Table.Name != old.Name || ch.Table.Family != old.Family {
			continue
		}
		if ch.Name == "forward-"+bridge || ch.Name == "postrouting-"+bridge {
			c.FlushChain(ch)
			c.DelChain(ch)
			continue
		}
		left = true
	}
	if !left {
		c.DelTable(old)
	}
}

// addressOf returns the address that EnsureBridge gave a bridge.
func addressOf(bridge netlink.Link) (netip.Prefix, error) {
	addresses, err := hostnet.List(func() ([]netlink.Addr, error) { return netlink.AddrList(bridge, netlink.FAMILY_V4) })
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("read the addresses of bridge %s: %w", bridge.Attrs().Name, err)
	}
	for _, a := range addresses {
		ip, ok := netip.AddrFromSlice(a.IP.To4())
		bits, _ := a.Mask.Size()
		if p := netip.PrefixFrom(ip, bits); ok && p == hostnet.Gateway(p) {
			return p, nil
		}
	}
	return netip.Prefix{}, fault.New(fault.Conflict, "bridge %s has no address of banger's", bridge.Attrs().Name).
		WithHint("restart the daemon: banger daemon restart")
}

// checkGuests refuses guests outside of the bridge's subnet or with somebody else's TAP device. Those whose device is
// gone are left out: nothing comes from them, and the name may be another user's next.
func checkGuests(rules hostnet.Rules, address netip.Prefix, bridge string, me owner) (hostnet.Rules, error) {
	links, err := hostnet.List(netlink.LinkList)
	if err != nil {
		return rules, fmt.Errorf("list network devices: %w", err)
	}
	byName := map[string]netlink.Link{}
	for _, l := range links {
		byName[l.Attrs().Name] = l
	}
	kept := rules
	kept.Guests = nil
	for _, g := range rules.Guests {
		if g.IP.IsValid() && (!address.Contains(g.IP) || g.IP == address.Addr() || g.IP == address.Masked().Addr() || !address.Contains(g.IP.Next())) {
			return rules, fault.New(fault.Usage, "guest %s is not in the subnet of bridge %s, %s", g.IP, bridge, address.Masked()).
				WithHint("set the subnet back in config.toml, or make the VM anew")
		}
		link, ok := byName[g.TAP]
		if !ok {
			continue
		}
		if err := checkTAP(link, me); err != nil {
			return rules, err
		}
		kept.Guests = append(kept.Guests, g)
	}
	return kept, nil
}

// bridgeIPv6 gives a bridge the IPv6 address that goes with its IPv4 one, without waiting whether others have it. A
// host without IPv6 is told.
func bridgeIPv6(link netlink.Link, address netip.Prefix) (string, error) {
	want := &net.IPNet{IP: address.Addr().AsSlice(), Mask: net.CIDRMask(address.Bits(), 128)}
	have, err := hostnet.List(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_V6) })
	if err != nil {
		return "", fmt.Errorf("read the addresses of bridge %s: %w", link.Attrs().Name, err)
	}
	for _, a := range have {
		ip, _ := netip.AddrFromSlice(a.IP)
		switch {
		case a.IPNet.String() == want.String():
			return "", nil
		case ip.IsPrivate():
			if err := netlink.AddrDel(link, &a); err != nil {
				return "", fmt.Errorf("remove address %s of bridge %s: %w", a.IPNet, link.Attrs().Name, err)
			}
		}
	}
	err = netlink.AddrAdd(link, &netlink.Addr{IPNet: want, Flags: unix.IFA_F_NODAD})
	switch {
	case err == nil || errors.Is(err, unix.EEXIST):
		return "", nil
	case errors.Is(err, unix.EACCES), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.EAFNOSUPPORT):
		return "IPv6 is switched off on this host: it reaches VMs by IPv4 alone", nil
	}
	return "", fmt.Errorf("give address %s to bridge %s: %w", address, link.Attrs().Name, err)
}
