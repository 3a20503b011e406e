package helper

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"os"
	"regexp"
	"slices"

	"github.com/google/nftables"

	"banger/internal/fault"
)

// IPv4 forwarding is one switch of the whole host. A helper that turns it on says so in its table, by a set, where
// helpers to come find it; nothing of it outlives a reboot, as the switch does not. When nobody of ours needs it any
// more it is turned off again, unless others on this host have begun to forward meanwhile: they found it on, and may rely
// on it. The set holds fingerprints of the chains that were there before, with forwarding off.

const forwardingMarkName = "forwarding-was-off"

// memory is what there was before a bridge of ours needed forwarding; nil when it was on.
type memory [][]byte

// remember returns the memory of a host that does not forward.
func remember(chains []*nftables.Chain) memory {
	m := memory{}
	for _, ch := range chains {
		if f := fingerprint(ch); sendsOn(ch) && !m.knows(f) {
			m = append(m, f)
		}
	}
	return m
}

func (m memory) knows(f []byte) bool {
	return slices.ContainsFunc(m, func(k []byte) bool { return bytes.Equal(k, f) })
}

// fingerprint is as long as the keys of the set, which are IPv6 addresses to the kernel.
func fingerprint(ch *nftables.Chain) []byte {
	sum := sha256.Sum256([]byte(fmt.Sprintf("%d %s %s", ch.Table.Family, ch.Table.Name, ch.Name)))
	return sum[:16]
}

// write queues the memory into a table, or that the table has none.
func (m memory) write(c *nftables.Conn, t *nftables.Table) error {
	set := &nftables.Set{Table: t, Name: forwardingMarkName, KeyType: nftables.TypeIP6Addr}
	if err := addSet(c, set, m); err != nil {
		return err
	}
	if m == nil {
		c.DelSet(set) // what is deleted must exist: it was added for that
	}
	return nil
}

// ourTable matches the tables of all bridges of banger.
var ourTable = regexp.MustCompile(`^banger[0-9]{1,3}$`)

// legacyTable is the one that all bridges shared before protocol version 2.
const legacyTable = "banger"

func forwards() (bool, error) {
	now, err := os.ReadFile(ipForward)
	if err != nil {
		return false, fault.Wrap(fault.Precondition, err, "cannot read whether this host forwards IPv4")
	}
	return bytes.Equal(bytes.TrimSpace(now), []byte("1")), nil
}

// forward turns IPv4 forwarding on or off; CAP_NET_ADMIN is enough for that.
func forward(on bool) error {
	value, word := []byte("0\n"), "off"
	if on {
		value, word = []byte("1\n"), "on"
	}
	if err := os.WriteFile(ipForward, value, 0); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot switch IPv4 forwarding %s", word).
			WithHint("sudo sysctl -w net.ipv4.ip_forward=%c", value[0])
	}
	return nil
}

// recall returns what a bridge's table remembers.
func recall(c *nftables.Conn, tables []*nftables.Table, bridge string) (memory, error) {
	table := &nftables.Table{Name: bridge, Family: nftables.TableFamilyINet}
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == table.Name && t.Family == table.Family }) {
		return nil, nil
	}
	sets, err := c.GetSets(table)
	if err != nil {
		return nil, fmt.Errorf("read nftables sets: %w", err)
	}
	for _, set := range sets {
		if set.Name != forwardingMarkName {
			continue
		}
		elements, err := c.GetSetElements(set)
		if err != nil {
			return nil, fmt.Errorf("read nftables set %s: %w", set.Name, err)
		}
		m := memory{}
		for _, e := range elements {
			m = append(m, e.Key)
		}
		return m, nil
	}
	return nil, nil
}

// putBack turns IPv4 forwarding off after the last of a bridge's guests with NAT. Another bridge of ours inherits the
// memory instead.
func (m memory) putBack(c *nftables.Conn, bridge string, tables []*nftables.Table, chains []*nftables.Chain) error {
	for _, t := range tables {
		if t.Family == nftables.TableFamilyINet && t.Name != bridge && ourTable.MatchString(t.Name) {
			if err := m.write(c, t); err != nil {
				return err
			}
			return commit(c)
		}
	}
	for _, ch := range chains {
		if ch.Table.Name != bridge && sendsOn(ch) && !m.knows(fingerprint(ch)) {
			return nil
		}
	}
	return forward(false)
}

// sendsOn tells a chain that somebody has who forwards packets through this host, or filters what is forwarded.
func sendsOn(ch *nftables.Chain) bool {
	if ch.Hooknum == nil || ch.Table.Family == nftables.TableFamilyBridge {
		return false
	}
	return *ch.Hooknum == *nftables.ChainHookForward || ch.Type == nftables.ChainTypeNAT && *ch.Hooknum == *nftables.ChainHookPostrouting
}
