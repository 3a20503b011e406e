package hostnet_test

import (
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"banger/internal/hostnet"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

// The rule sets of other firewalls, with what they have in common with the real ones: where they deny by default.
var firewalls = map[string]struct{ rules, opened string }{
	// dockerd 20 to 27 with iptables-nft: a policy, and jumps into chains of its own.
	"docker": {`
table ip filter {
	chain DOCKER { }
	chain DOCKER-ISOLATION-STAGE-2 { oifname "docker0" counter drop; counter return; }
	chain DOCKER-ISOLATION-STAGE-1 { iifname "docker0" oifname != "docker0" counter jump DOCKER-ISOLATION-STAGE-2; counter return; }
	chain DOCKER-USER { counter return; }
	chain FORWARD { type filter hook forward priority filter; policy drop;
		counter jump DOCKER-USER
		counter jump DOCKER-ISOLATION-STAGE-1
		oifname "docker0" ct state related,established counter accept
		oifname "docker0" counter jump DOCKER
		iifname "docker0" oifname != "docker0" counter accept
		iifname "docker0" oifname "docker0" counter accept
	}
}
table ip nat {
	chain DOCKER { iifname "docker0" counter return; }
	chain PREROUTING { type nat hook prerouting priority dstnat; policy accept; fib daddr type local counter jump DOCKER; }
	chain POSTROUTING { type nat hook postrouting priority srcnat; policy accept;
		oifname != "docker0" ip saddr 172.17.0.0/16 counter masquerade
	}
}
`, "ip filter FORWARD"},
	// ufw: policies in both families, and an own chain that rejects at the end.
	"ufw": {`
table ip filter {
	chain ufw-before-input { iifname "lo" counter accept; ct state related,established counter accept; }
	chain ufw-reject-forward { counter reject; }
	chain INPUT { type filter hook input priority filter; policy drop; counter jump ufw-before-input; }
	chain FORWARD { type filter hook forward priority filter; policy drop; ct state related,established counter accept; }
}
table ip6 filter {
	chain INPUT { type filter hook input priority filter; policy drop; icmpv6 type { nd-neighbor-solicit, nd-neighbor-advert } accept; }
	chain FORWARD { type filter hook forward priority filter; policy drop; }
}
`, "ip filter FORWARD,ip filter INPUT,ip6 filter INPUT"},
	// firewalld with its nftables backend: one inet table, whose zones' chains reject what no zone knows.
	"firewalld": {`
table inet firewalld {
	chain filter_FWD_public { counter reject with icmpx admin-prohibited; }
	chain filter_IN_public { tcp dport 22 accept; counter reject with icmpx admin-prohibited; }
	chain filter_FORWARD { type filter hook forward priority filter + 10; policy accept;
		ct state { established, related } accept
		iifname "lo" accept
		jump filter_FWD_public
		reject with icmpx admin-prohibited
	}
	chain filter_INPUT { type filter hook input priority filter + 10; policy accept;
		ct state { established, related } accept
		iifname "lo" accept
		jump filter_IN_public
		reject with icmpx admin-prohibited
	}
}
`, "inet firewalld filter_FORWARD,inet firewalld filter_INPUT"},
	// An administrator's own, with a denial in the last line instead of a policy.
	"by hand": {`
table inet mine {
	chain forward { type filter hook forward priority -5; policy accept;
		ip daddr 198.51.100.99 counter drop
		counter log drop
	}
}
`, "inet mine forward"},
}

func (w *world) load(t *testing.T, rules string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "rules")
	// One statement a line, as this version of nft wants it.
	text := strings.NewReplacer("; }", "\n}", " { ", " {\n", ";", "\n").Replace(rules)
	text = restoreSets(text)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	w.host.Run(t, "nft", "-f", file)
}

// restoreSets puts anonymous sets onto one line again.
func restoreSets(text string) string {
	for _, set := range []string{"established, related", "nd-neighbor-solicit, nd-neighbor-advert"} {
		text = strings.ReplaceAll(text, "{\n"+set+" }", "{ "+set+" }")
	}
	return text
}

// ruleset is all that is not ours, without counters' values.
func (w *world) ruleset(t *testing.T) string {
	t.Helper()
	return w.host.Run(t, "nft", "--stateless", "--handle", "list", "ruleset")
}

// reaches waits until the guest reaches the internet, as it does once a change of the firewall was noticed.
func (w *world) reaches(t *testing.T) {
	t.Helper()
	deadline := time.Now().Add(hopeful)
	for time.Now().Before(deadline) {
		if got := seenFrom(t, w.guest, internetServer, hopeless); got == "198.51.100.1" {
			return
		}
	}
	t.Fatalf("the guest does not reach the internet\n%s", w.host.Run(t, "nft", "list", "ruleset"))
}

// eventually waits for what happens soon.
func eventually(t *testing.T, happened func() bool) {
	t.Helper()
	for deadline := time.Now().Add(hopeful); !happened(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("it did not happen")
		}
	}
}

func names(t *testing.T, w *world) {
	t.Helper()
	serveAddresses(t, w.host, w.address.Addr().String()+":53")
}

// TestOtherFirewallsThatWereThere: packets pass that they deny by default, and afterwards they are what they were.
func TestOtherFirewallsThatWereThere(t *testing.T) {
	for name, f := range firewalls {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			names(t, w)
			w.load(t, f.rules)
			before := w.ruleset(t)
			if got := seenFrom(t, w.guest, internetServer, hopeless); got != "" {
				t.Fatalf("without banger's rules the guest is seen as %q", got)
			}
			w.nat(t, true)
			if got := seenFrom(t, w.guest, internetServer, hopeful); got != "198.51.100.1" {
				t.Fatalf("the guest is seen as %q\n%s", got, w.host.Run(t, "nft", "list", "ruleset"))
			}
			if got := seenFrom(t, w.guest, w.address.Addr().String()+":53", hopeful); got == "" {
				t.Error("the guest does not reach banger's names")
			}
			if got := strings.Join(w.client.Status().Opened, ","); got != f.opened {
				t.Errorf("opened %s, want %s", got, f.opened)
			}
			w.nat(t, true) // again: nothing doubles
			w.down(t)
			if after := w.ruleset(t); after != before {
				t.Errorf("after:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
}

// down takes back all that was made for the guest.
func (w *world) down(t *testing.T) {
	t.Helper()
	if err := w.client.Detach(t.Context(), "00000001"); err != nil {
		t.Fatal(err)
	}
}

// TestOtherFirewallsThatCome: a firewall that is started, or reloaded, while a guest has NAT is noticed.
func TestOtherFirewallsThatCome(t *testing.T) {
	for name, f := range firewalls {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.nat(t, true)
			for range 2 {
				w.load(t, "flush ruleset\n"+f.rules) // as nftables.service and firewalld do
				w.reaches(t)
			}
			w.down(t)
			after := w.ruleset(t)
			w.load(t, "flush ruleset\n"+f.rules)
			if want := w.ruleset(t); withoutHandles(after) != withoutHandles(want) {
				t.Errorf("after:\n%s\nwant:\n%s", after, want)
			}
		})
	}
}

func withoutHandles(rules string) string {
	var b strings.Builder
	for line := range strings.Lines(rules) {
		line, _, _ = strings.Cut(line, " # handle")
		b.WriteString(strings.TrimRight(line, "\n") + "\n")
	}
	return b.String()
}

// TestIPTables: the chains that iptables makes, and it still can read and change them with our rules in them.
func TestIPTables(t *testing.T) {
	iptables := need.Binary(t, "iptables-nft")
	w := newWorld(t)
	for _, line := range []string{
		"-P FORWARD DROP", "-N DOCKER-USER", "-A DOCKER-USER -j RETURN", "-A FORWARD -j DOCKER-USER",
		"-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
	} {
		w.host.Run(t, iptables, strings.Fields(line)...)
	}
	before := w.host.Run(t, iptables, "-S")
	exact := w.ruleset(t)
	w.nat(t, true)
	w.reaches(t)
	during := w.host.Run(t, iptables, "-S")
	for _, want := range []string{"-A FORWARD -i banger0 -m comment", "-A FORWARD -o banger0 -m comment"} {
		if !strings.Contains(during, want) {
			t.Errorf("%q is not in\n%s", want, during)
		}
	}
	// What the administrator forbids comes first.
	w.host.Run(t, iptables, "-I", "DOCKER-USER", "-d", "198.51.100.2", "-j", "DROP")
	if got := seenFrom(t, w.guest, internetServer, hopeless); got != "" {
		t.Errorf("past the administrator's rule the guest is seen as %s", got)
	}
	w.host.Run(t, iptables, "-D", "DOCKER-USER", "-d", "198.51.100.2", "-j", "DROP")
	w.down(t)
	if after := w.host.Run(t, iptables, "-S"); after != before {
		t.Errorf("after:\n%s\nbefore:\n%s", after, before)
	}
	if after := w.ruleset(t); after != exact {
		t.Errorf("after:\n%s\nbefore:\n%s", after, exact)
	}
}

// TestTableWithAnOwner: firewalld 2 lets nobody change its table. That is told, with the command that helps.
func TestTableWithAnOwner(t *testing.T) {
	w := newWorld(t)
	owner := ownTable(t, w.host)
	defer owner()
	w.nat(t, true)
	s := w.client.Status()
	if len(s.Notices) != 1 || !strings.Contains(s.Notices[0], "firewall-cmd --permanent --zone=trusted --add-interface=banger0") || len(s.Opened) > 0 {
		t.Errorf("status %+v", s)
	}
}

// TestHostServices: what listens on the host is not for guests, unless the configuration says so. Neither are the
// published ports of the host's containers.
func TestHostServices(t *testing.T) {
	for _, open := range []bool{false, true} {
		t.Run(fmt.Sprintf("open=%t", open), func(t *testing.T) {
			w := newWorldWith(t, hostnet.Options{Policy: hostnet.Policy{HostServices: open}})
			names(t, w)
			serveAddresses(t, w.host, "0.0.0.0:2222")
			w.nat(t, true)
			// A container: another namespace, published as port 8080 of the host.
			w.host.Run(t, "nft", "add table ip dockernat; add chain ip dockernat pre { type nat hook prerouting priority dstnat; };"+
				"add rule ip dockernat pre tcp dport 8080 dnat to "+internetServer)
			for _, server := range []string{w.address.Addr().String() + ":2222", "198.51.100.1:2222", "198.51.100.1:8080"} {
				began := time.Now()
				got := seenFrom(t, w.guest, server, hopeful)
				if (got != "") != open {
					t.Errorf("at %s the guest is seen as %q", server, got)
				}
				if took := time.Since(began); got == "" && took > hopeful/2 {
					t.Errorf("it took %s to learn that %s is refused", took, server)
				}
			}
			if got := seenFrom(t, w.guest, w.address.Addr().String()+":53", hopeful); got == "" {
				t.Error("the guest does not reach banger's names")
			}
			if out, err := w.guest.Try(need.Binary(t, "ping"), "-c1", "-W5", w.address.Addr().String()); err != nil {
				t.Errorf("the guest does not reach its gateway: %s", out)
			}
			// The host reaches the guest and gets its answers.
			serveAddresses(t, w.guest, guestAddress.String()+":22")
			if got := seenFrom(t, w.host, guestAddress.String()+":22", hopeful); got != "172.30.0.1" {
				t.Errorf("the host is seen as %q", got)
			}
		})
	}
}

func TestLinkLocalWhenAllowed(t *testing.T) {
	const metadata = "169.254.169.254:80"
	w := newWorldWith(t, hostnet.Options{Policy: hostnet.Policy{LinkLocal: true}})
	w.internet.Run(t, "ip", "addr", "add", "169.254.169.254/32", "dev", "net0")
	w.host.Run(t, "ip", "route", "add", "169.254.169.254/32", "dev", "up0")
	serveAddresses(t, w.internet, metadata)
	w.nat(t, true)
	if got := seenFrom(t, w.guest, metadata, hopeful); got == "" {
		t.Error("the guest does not reach it")
	}
}

// TestForwardingIsPutBack: only when it was off before, and nobody else came to rely on it.
func TestForwardingIsPutBack(t *testing.T) {
	const docker = "add table ip nat; add chain ip nat POSTROUTING { type nat hook postrouting priority srcnat; }"
	const ufw = "add table ip filter; add chain ip filter FORWARD { type filter hook forward priority filter; policy drop; }"
	for name, c := range map[string]struct{ forwarding, before, during, want string }{
		"off":              {"0", "", "", "0\n"},
		"on":               {"1", "", "", "1\n"},
		"a filter before":  {"0", ufw, "", "0\n"},
		"it is reloaded":   {"0", ufw, "flush ruleset; " + ufw, "0\n"},
		"docker meanwhile": {"0", ufw, docker, "1\n"},
	} {
		t.Run(name, func(t *testing.T) {
			w := newWorld(t)
			w.host.Run(t, "sysctl", "-qw", "net.ipv4.ip_forward="+c.forwarding)
			if c.before != "" {
				w.host.Run(t, "nft", c.before)
			}
			w.nat(t, true)
			if c.during != "" {
				w.host.Run(t, "nft", c.during)
			}
			w.nat(t, true)
			w.nat(t, false)
			if out := w.host.Run(t, "sysctl", "-n", "net.ipv4.ip_forward"); out != c.want {
				t.Errorf("forwarding is %s", out)
			}
		})
	}
}

// TestForwardingIsPutBackByAnotherHelper: what was before is remembered in the kernel, not in a process.
func TestForwardingIsPutBackByAnotherHelper(t *testing.T) {
	w := newWorld(t)
	w.nat(t, true)
	if err := w.client.Close(); err != nil {
		t.Fatal(err)
	}
	next := start(t, hostnet.Options{})
	if removed, err := next.Settle(t.Context(), nil); err != nil || len(removed) > 0 {
		t.Errorf("removed %v, %v", removed, err)
	}
	if out := w.host.Run(t, "sysctl", "-n", "net.ipv4.ip_forward"); out != "0\n" {
		t.Errorf("forwarding is %s", out)
	}
	if out := w.host.Run(t, "nft", "list", "ruleset"); out != "" {
		t.Errorf("rules are left:\n%s", out)
	}
}

// TestTableOfBeforeVersion2 goes with the first rules that are written.
func TestTableOfBeforeVersion2(t *testing.T) {
	w := newWorld(t)
	w.host.Run(t, "nft", "add table inet banger; add set inet banger nat-banger0 { type ipv4_addr; };"+
		"add chain inet banger forward-banger0 { type filter hook forward priority filter; }; add rule inet banger forward-banger0 iifname banger0 drop;"+
		"add chain inet banger postrouting-banger0 { type nat hook postrouting priority srcnat; }")
	w.nat(t, true)
	if out := w.host.Run(t, "nft", "list", "tables"); strings.Contains(out, "inet banger\n") {
		t.Errorf("tables:\n%s", out)
	}
	if got := seenFrom(t, w.guest, internetServer, hopeful); got != "198.51.100.1" {
		t.Errorf("the guest is seen as %q", got)
	}
}

// TestFlushedRulesComeBack without anybody asking for them.
func TestFlushedRulesComeBack(t *testing.T) {
	w := newWorld(t)
	w.nat(t, true)
	want := w.host.Run(t, "nft", "list", "ruleset")
	w.host.Run(t, "nft", "flush", "ruleset")
	w.reaches(t)
	if got := w.host.Run(t, "nft", "list", "ruleset"); got != want {
		t.Errorf("rules:\n%s\nwant:\n%s", got, want)
	}
}

// TestRemovedPortRulesComeBack: who removes one half of the rules does not leave VMs with each other's addresses.
func TestRemovedPortRulesComeBack(t *testing.T) {
	w := newWorld(t)
	w.nat(t, true)
	want := w.host.Run(t, "nft", "list", "table", "bridge", "banger0")
	w.host.Run(t, "nft", "delete", "table", "bridge", "banger0")
	eventually(t, func() bool {
		got, err := w.host.Try("nft", "list", "table", "bridge", "banger0")
		return err == nil && got == want
	})
}

// TestFiveHundredGuests are set at once.
func TestFiveHundredGuests(t *testing.T) {
	ns := hosttest.NetNS(t)
	c := start(t, hostnet.Options{})
	ensure(t, c)
	var rules hostnet.Rules
	address := netip.MustParseAddr("172.30.0.2")
	for i := range 500 {
		tap := fmt.Sprintf("tap-pool-%d", i)
		if i < 3 { // the rules of a device that is not there are left out
			if err := c.AddTAP(t.Context(), tap); err != nil {
				t.Fatal(err)
			}
		}
		rules.Guests = append(rules.Guests, hostnet.Guest{TAP: tap, MAC: fmt.Sprintf("02:b6:00:00:%02x:%02x", i/256, i%256), IP: address, NAT: true, Isolated: i == 1})
		address = address.Next()
	}
	if err := c.SetRules(t.Context(), rules); err != nil {
		t.Fatal(err)
	}
	out := ns.Run(t, "nft", "list", "ruleset")
	if strings.Count(out, `"tap-pool-0"`) < 4 || strings.Contains(out, "172.30.0.5") {
		t.Errorf("rules:\n%s", out)
	}
	begin := time.Now()
	rules.Guests = slices.Repeat(rules.Guests[:1], hostnet.MaxGuests+1)
	if err := c.SetRules(t.Context(), rules); err == nil {
		t.Error("more guests than a bridge can have")
	}
	t.Logf("refused in %s", time.Since(begin))
}
