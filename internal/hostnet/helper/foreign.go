package helper

import (
	"bytes"
	"errors"
	"fmt"
	"math/bits"
	"os"
	"slices"
	"strings"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/google/nftables/userdata"
	"golang.org/x/sys/unix"

	"banger/internal/hostnet"
)

// Other firewalls. A packet passes a hook when no chain there drops it, so where Docker, ufw, firewalld or the
// administrator denies by default what is forwarded or comes in, an accept in our own table is not enough. There, and
// nowhere else, marked rules accept what goes to and from the bridge; our own table still drops what a guest may
// not. They stand right before the denial (a rule that drops or rejects everything, or the chain's policy), so that
// every rule that somebody wrote on purpose comes first. firewalld denies within the chains of its zones, so there
// they stand first. When no guest needs them they are taken away, and the chain is what it was.

// tableFlagOwner is NFT_TABLE_F_OWNER of linux/netfilter/nf_tables.h: nobody else may change the table.
const tableFlagOwner = 0x2

const firewalldTable = "firewalld"

// opening is a rule that accepts something in a chain of somebody else's.
type opening struct {
	tag   string
	exprs []expr.Any
}

// others writes openings into other firewalls' chains.
type others struct {
	bridge string
	rules  hostnet.Rules
	nfCall bool // bridged packets come through the IP chains as well
}

// result is what became of openings.
type result struct {
	opened  []string // chains that hold some
	notices []string // chains that could not be changed
	changed bool
}

// settle makes the openings of all chains what they are to be.
func (o others) settle(c *nftables.Conn) (result, error) {
	var err error
	var r result
	for range listTries { // somebody may change a chain between our reading and writing it
		if r, err = o.settleOnce(c); !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.EBUSY) {
			break
		}
	}
	return r, err
}

// listTries is how often a chain is read again that changed under us.
const listTries = 5

func (o others) settleOnce(c *nftables.Conn) (r result, err error) {
	tables, chains, err := listAll(c)
	if err != nil {
		return r, err
	}
	for _, chain := range chains {
		if ourTable.MatchString(chain.Table.Name) || chain.Table.Name == legacyTable || chain.Type != nftables.ChainTypeFilter {
			continue
		}
		want := o.wanted(chain)
		if want == nil && !filtersIP(chain) {
			continue
		}
		rules, err := c.GetRules(chain.Table, chain)
		if err != nil {
			return r, fmt.Errorf("read nftables chain %s: %w", chainName(chain), err)
		}
		before, denies := denial(chain, rules)
		if !denies {
			want = nil
		}
		owned := slices.ContainsFunc(tables, func(t *nftables.Table) bool {
			return t.Name == chain.Table.Name && t.Family == chain.Table.Family && (t.Flags|bits.ReverseBytes32(t.Flags))&tableFlagOwner != 0 // the library reads it in the host's order
		})
		switch {
		case len(want) > 0 && owned:
			r.notices = append(r.notices, ownedNotice(chain, o.bridge))
			continue
		case !o.inPlace(rules, want, before):
			o.write(c, chain, rules, want, before)
			r.changed = true
		}
		if len(want) > 0 {
			r.opened = append(r.opened, chainName(chain))
		}
	}
	slices.Sort(r.opened)
	return r, commit(c)
}

func ownedNotice(chain *nftables.Chain, bridge string) string {
	notice := fmt.Sprintf("chain %s of another firewall denies VMs' packets and lets nobody change it", chainName(chain))
	if chain.Table.Name == firewalldTable {
		notice += fmt.Sprintf("; run: sudo firewall-cmd --permanent --zone=trusted --add-interface=%s && sudo firewall-cmd --reload", bridge)
	}
	return notice
}

func chainName(c *nftables.Chain) string {
	family := map[nftables.TableFamily]string{
		nftables.TableFamilyINet: "inet", nftables.TableFamilyIPv4: "ip", nftables.TableFamilyIPv6: "ip6",
	}[c.Table.Family]
	return strings.Join([]string{family, c.Table.Name, c.Name}, " ")
}

// filtersIP tells a chain that IP packets come through on their way to this host or through it.
func filtersIP(c *nftables.Chain) bool {
	switch c.Table.Family {
	case nftables.TableFamilyINet, nftables.TableFamilyIPv4, nftables.TableFamilyIPv6:
		return c.Hooknum != nil && (*c.Hooknum == *nftables.ChainHookForward || *c.Hooknum == *nftables.ChainHookInput)
	}
	return false
}

// wanted returns the openings that a chain needs if it denies.
func (o others) wanted(c *nftables.Chain) []opening {
	if !filtersIP(c) || len(o.rules.Guests) == 0 {
		return nil
	}
	in, out := device(expr.MetaKeyIIFNAME, expr.CmpOpEq, o.bridge), device(expr.MetaKeyOIFNAME, expr.CmpOpEq, o.bridge)
	if *c.Hooknum == *nftables.ChainHookInput {
		return []opening{
			{"names, UDP", join(in, toPort(unix.IPPROTO_UDP, dnsPort), accept())},
			{"names, TCP", join(in, toPort(unix.IPPROTO_TCP, dnsPort), accept())},
		}
	}
	var all []opening
	if o.nfCall && len(o.rules.Guests) > 1 {
		all = append(all, opening{"siblings", join(in, out, accept())})
	}
	if o.rules.AnyNAT() && c.Table.Family != nftables.TableFamilyIPv6 { // guests leave by IPv4 alone
		all = append(all, opening{"from VMs", join(in, accept())}, opening{"to VMs", join(out, accept())})
	}
	return all
}

// denial returns the rule of a chain that our openings stand before: 0 for its end, and whether the chain denies
// by default at all.
func denial(c *nftables.Chain, rules []*nftables.Rule) (before uint64, denies bool) {
	if c.Table.Name == firewalldTable && len(rules) > 0 {
		for _, r := range rules {
			if mark(r) == "" {
				return r.Handle, true
			}
		}
	}
	for _, r := range rules {
		if deniesAll(r.Exprs) {
			return r.Handle, true
		}
	}
	return 0, c.Policy != nil && *c.Policy == nftables.ChainPolicyDrop
}

// deniesAll tells a rule that denies whatever comes to it.
func deniesAll(exprs []expr.Any) bool {
	for _, e := range exprs {
		switch e := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Reject:
			return true
		case *expr.Verdict:
			return e.Kind == expr.VerdictDrop
		case *expr.Target:
			return e.Name == "REJECT" || e.Name == "DROP"
		default:
			return false
		}
	}
	return false
}

// markPrefix begins the comment of our rules in others' chains, which goes on with the bridge and what it is for.
const markPrefix = "banger: "

// mark returns a rule's comment when it is one of ours.
func mark(r *nftables.Rule) string {
	if len(r.UserData) < 2 || len(r.UserData) < 2+int(r.UserData[1]) {
		return ""
	}
	comment := string(bytes.TrimRight(userdata.Get(r.UserData, userdata.TypeComment), "\x00"))
	if !strings.HasPrefix(comment, markPrefix) {
		return ""
	}
	return comment
}

func (o others) mark(tag string) string { return markPrefix + o.bridge + ", " + tag }

func (o others) ours(r *nftables.Rule) bool { return strings.HasPrefix(mark(r), o.mark("")) }

// inPlace tells whether a chain holds the wanted openings and no other ones of ours, all before the denial.
func (o others) inPlace(rules []*nftables.Rule, want []opening, before uint64) bool {
	var have []string
	denied := false
	for _, r := range rules {
		denied = denied || before != 0 && r.Handle == before
		if !o.ours(r) {
			continue
		}
		if denied {
			return false
		}
		have = append(have, mark(r))
	}
	return slices.EqualFunc(have, want, func(h string, w opening) bool { return h == o.mark(w.tag) })
}

// write queues the removal of our rules in a chain, and the openings it is to have.
func (o others) write(c *nftables.Conn, chain *nftables.Chain, rules []*nftables.Rule, want []opening, before uint64) {
	for _, r := range rules {
		if o.ours(r) {
			_ = c.DelRule(&nftables.Rule{Table: chain.Table, Chain: chain, Handle: r.Handle}) // fails without a handle alone
		}
	}
	for _, w := range want {
		rule := &nftables.Rule{
			Table: chain.Table, Chain: chain, Exprs: w.exprs,
			UserData: userdata.AppendString(nil, userdata.TypeComment, o.mark(w.tag)),
		}
		if before == 0 {
			c.AddRule(rule)
			continue
		}
		rule.Position = before
		c.InsertRule(rule)
	}
}

func listAll(c *nftables.Conn) ([]*nftables.Table, []*nftables.Chain, error) {
	tables, err := c.ListTables()
	if err != nil {
		return nil, nil, nftFault(err)
	}
	chains, err := c.ListChains()
	if err != nil {
		return nil, nil, nftFault(err)
	}
	return tables, chains, nil
}

// bridgeNFCall says whether bridged packets come through the IP chains (br_netfilter, Documentation/networking/ip-sysctl.rst).
const bridgeNFCall = "/proc/sys/net/bridge/bridge-nf-call-iptables"

// nfCall tells whether bridged packets may come through the IP chains. The file comes with the kernel's module,
// maybe after we gave up opening others: then it is there and refused.
func nfCall() bool {
	text, err := os.ReadFile(bridgeNFCall)
	return err == nil && strings.TrimSpace(string(text)) == "1" || errors.Is(err, os.ErrPermission)
}
