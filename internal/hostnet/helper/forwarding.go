package helper

import (
	"bytes"
	"fmt"
	"os"
	"regexp"
	"slices"

	"github.com/google/nftables"

	"banger/internal/fault"
)

// IPv4 forwarding is one switch of the whole host. A helper that turns it on says so in its table, by an empty
// set, where helpers to come find it; nothing of it outlives a reboot, as the switch does not. When nobody of ours
// needs it any more it is turned off again, unless others on this host forward too: they may have come after us and
// found it on.

const forwardingMarkName = "forwarding-was-off"

func forwardingMark(t *nftables.Table) *nftables.Set {
	return &nftables.Set{Table: t, Name: forwardingMarkName, KeyType: nftables.TypeIPAddr}
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

// marked tells whether a table says that forwarding was off before.
func marked(c *nftables.Conn, tables []*nftables.Table, name string) (bool, error) {
	if !slices.ContainsFunc(tables, func(t *nftables.Table) bool { return t.Name == name && t.Family == nftables.TableFamilyINet }) {
		return false, nil
	}
	sets, err := c.GetSets(&nftables.Table{Name: name, Family: nftables.TableFamilyINet})
	if err != nil {
		return false, fmt.Errorf("read nftables sets: %w", err)
	}
	return slices.ContainsFunc(sets, func(s *nftables.Set) bool { return s.Name == forwardingMarkName }), nil
}

// stopForwarding puts IPv4 forwarding back after the last of a bridge's guests with NAT, when this bridge
// turned it on. The first other bridge of ours inherits the duty.
func stopForwarding(c *nftables.Conn, bridge string, tables []*nftables.Table, chains []*nftables.Chain) error {
	for _, t := range tables {
		if t.Family == nftables.TableFamilyINet && t.Name != bridge && ourTable.MatchString(t.Name) {
			if err := addSet(c, forwardingMark(t), nil); err != nil {
				return err
			}
			return commit(c)
		}
	}
	if slices.ContainsFunc(chains, func(ch *nftables.Chain) bool { return ch.Table.Name != bridge && sendsOn(ch) }) {
		return nil
	}
	return forward(false)
}

// sendsOn tells a chain that somebody has who forwards packets through this host.
func sendsOn(ch *nftables.Chain) bool {
	if ch.Hooknum == nil || ch.Table.Family == nftables.TableFamilyBridge {
		return false
	}
	return *ch.Hooknum == *nftables.ChainHookForward || ch.Type == nftables.ChainTypeNAT && *ch.Hooknum == *nftables.ChainHookPostrouting
}
