package hostnet_test

import (
	"fmt"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/hostnet"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
	"banger/internal/vm"
)

// world is a host between a guest and an internet, each in a namespace of its own. The internet knows
// the host's address 198.51.100.1 and no private ones; it answers every TCP connection with the
// address that it sees.
type world struct {
	host, guest, internet *hosttest.NS
	client                *hostnet.Client
	address               netip.Prefix
}

const internetServer = "198.51.100.2:7000"

var guestAddress = netip.MustParseAddr("172.30.0.2")

func newWorld(t *testing.T) *world { return newWorldWith(t, hostnet.Options{}) }

func newWorldWith(t *testing.T, options hostnet.Options) *world {
	t.Helper()
	w := &world{host: hosttest.NetNS(t), guest: hosttest.NewNetNS(t), internet: hosttest.NewNetNS(t)}
	need.Binary(t, "nft")
	w.host.Run(t, "ip", "link", "add", "up0", "type", "veth", "peer", "name", "net0")
	w.host.Run(t, "ip", "link", "set", "net0", "netns", nsPath(w.internet))
	w.host.Run(t, "ip", "addr", "add", "198.51.100.1/24", "dev", "up0")
	w.host.Run(t, "ip", "link", "set", "up0", "up")
	w.internet.Run(t, "ip", "addr", "add", "198.51.100.2/24", "dev", "net0")
	w.internet.Run(t, "ip", "link", "set", "net0", "up")
	w.client = start(t, options)
	w.address = ensure(t, w.client)
	settle(t, w.client)
	w.host.Run(t, "ip", "link", "add", "port0", "type", "veth", "peer", "name", "eth0")
	w.host.Run(t, "ip", "link", "set", "eth0", "netns", nsPath(w.guest))
	w.host.Run(t, "ip", "link", "set", "port0", "master", "banger0", "up")
	w.guest.Run(t, "ip", "addr", "add", guestAddress.String()+"/16", "dev", "eth0")
	w.guest.Run(t, "ip", "link", "set", "eth0", "up")
	w.guest.Run(t, "ip", "route", "add", "default", "via", w.address.Addr().String())
	serveAddresses(t, w.internet, internetServer)
	return w
}

func settle(t testing.TB, c *hostnet.Client) {
	t.Helper()
	if _, err := c.Settle(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
}

func nsPath(ns *hosttest.NS) string { return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), ns.FD()) }

// serveAddresses answers TCP connections in a namespace with the peer's address.
func serveAddresses(t *testing.T, ns *hosttest.NS, address string) {
	t.Helper()
	var l net.Listener
	err := ns.Do(func() (err error) {
		l, err = net.Listen("tcp", address)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			fmt.Fprint(conn, conn.RemoteAddr())
			conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
}

// How long a connection may take that is to come about, and one that is not.
const (
	hopeful  = 10 * time.Second
	hopeless = 500 * time.Millisecond
)

// seenFrom connects in a namespace and returns the address that the server sees, or "" when no
// connection comes about.
func seenFrom(t *testing.T, ns *hosttest.NS, server string, patience time.Duration) string {
	t.Helper()
	text := make([]byte, 64)
	n := 0
	err := ns.Do(func() error {
		conn, err := net.DialTimeout("tcp", server, patience)
		if err != nil {
			return err
		}
		defer conn.Close()
		conn.SetDeadline(time.Now().Add(2 * patience))
		n, _ = conn.Read(text)
		return nil
	})
	if err != nil {
		return ""
	}
	host, _, _ := net.SplitHostPort(string(text[:n]))
	return host
}

func (w *world) nat(t *testing.T, on bool) {
	t.Helper()
	w.attach(t, "00000001", hostnet.Guest{IP: guestAddress, NAT: on})
}

// attach makes a guest known under a TAP device of its own; its traffic comes from the namespace.
func (w *world) attach(t *testing.T, id vm.ID, g hostnet.Guest) string {
	t.Helper()
	g.MAC = hostnet.MAC(id)
	tap, err := w.client.Attach(t.Context(), id, g)
	if err != nil {
		t.Fatal(err)
	}
	return tap
}

func TestNAT(t *testing.T) {
	w := newWorld(t)
	if got := seenFrom(t, w.host, internetServer, hopeful); got != "198.51.100.1" {
		t.Fatalf("the host itself is seen as %q", got)
	}
	for range 2 { // asking twice is harmless
		w.nat(t, true)
		if got := seenFrom(t, w.guest, internetServer, hopeful); got != "198.51.100.1" {
			t.Fatalf("with NAT the guest is seen as %q\n%s", got, w.host.Run(t, "nft", "list", "ruleset"))
		}
	}
	if out := w.host.Run(t, "sysctl", "-n", "net.ipv4.ip_forward"); out != "1\n" {
		t.Errorf("forwarding is %s", out)
	}
	for range 2 {
		w.nat(t, false)
		if got := seenFrom(t, w.guest, internetServer, hopeless); got != "" {
			t.Errorf("without NAT the guest is seen as %q", got)
		}
	}
	// Nobody outside reaches the guest, also one who knows the way.
	w.nat(t, true)
	serveAddresses(t, w.guest, guestAddress.String()+":22")
	w.internet.Run(t, "ip", "route", "add", "172.30.0.0/16", "via", "198.51.100.1")
	if got := seenFrom(t, w.internet, guestAddress.String()+":22", hopeless); got != "" {
		t.Errorf("the internet reaches the guest as %q", got)
	}
	if got := seenFrom(t, w.host, guestAddress.String()+":22", hopeful); got != "172.30.0.1" {
		t.Errorf("the host reaches the guest as %q", got)
	}
}

// TestMetadataAddress: clouds hand out a machine's credentials at 169.254.169.254.
func TestMetadataAddress(t *testing.T) {
	const metadata = "169.254.169.254:80"
	w := newWorld(t)
	w.internet.Run(t, "ip", "addr", "add", "169.254.169.254/32", "dev", "net0")
	w.host.Run(t, "ip", "route", "add", "169.254.169.254/32", "dev", "up0")
	serveAddresses(t, w.internet, metadata)
	w.nat(t, true)
	if got := seenFrom(t, w.host, metadata, hopeful); got == "" {
		t.Fatal("the host itself does not reach it")
	}
	if got := seenFrom(t, w.guest, metadata, hopeless); got != "" {
		t.Errorf("a guest reaches it as %s", got)
	}
}

func TestNATIsPerGuest(t *testing.T) {
	w := newWorld(t)
	w.nat(t, true)
	other := netip.MustParseAddr("172.30.0.3")
	w.guest.Run(t, "ip", "addr", "add", other.String()+"/16", "dev", "eth0")
	if got := seenFrom(t, w.guest, internetServer, hopeful); got != "198.51.100.1" {
		t.Errorf("the guest with NAT is seen as %q", got)
	}
	w.guest.Run(t, "ip", "route", "replace", "default", "via", w.address.Addr().String(), "src", other.String())
	if got := seenFrom(t, w.guest, internetServer, hopeless); got != "" {
		t.Errorf("a guest without NAT is seen as %q", got)
	}
	w.attach(t, "00000002", hostnet.Guest{IP: other, NAT: true})
	if got := seenFrom(t, w.guest, internetServer, hopeful); got != "198.51.100.1" {
		t.Errorf("with NAT it is seen as %q", got)
	}
}

// dockerLike is a rule set with the shape of Docker's and ufw's: a filter table that drops what is forwarded,
// NAT of its own, a counter and a set.
const dockerLike = `
table ip filter {
	set known { type ipv4_addr; elements = { 10.0.0.1, 10.0.0.2 } }
	chain FORWARD { type filter hook forward priority filter; policy accept;
		iifname "docker0" ip saddr @known accept
		oifname "docker0" ct state related,established accept
		iifname "docker0" drop
	}
	chain INPUT { type filter hook input priority filter; policy accept; tcp dport 23 drop; }
}
table ip nat {
	chain POSTROUTING { type nat hook postrouting priority srcnat; policy accept;
		ip saddr 172.17.0.0/16 oifname != "docker0" masquerade
	}
}
`

func TestRulesOfOthersStayAsTheyAre(t *testing.T) {
	w := newWorld(t)
	file := filepath.Join(t.TempDir(), "rules")
	if err := os.WriteFile(file, []byte(dockerLike), 0o600); err != nil {
		t.Fatal(err)
	}
	w.host.Run(t, "nft", "-f", file)
	before := w.host.Run(t, "nft", "--handle", "list", "ruleset")
	w.nat(t, true)
	if got := seenFrom(t, w.guest, internetServer, hopeful); got != "198.51.100.1" {
		t.Errorf("with rules of others the guest is seen as %q", got)
	}
	during := w.host.Run(t, "nft", "--handle", "list", "ruleset")
	if !strings.HasPrefix(during, before) {
		t.Errorf("rules of others changed:\n%s\nbefore:\n%s", during, before)
	}
	for range 2 {
		if err := w.client.SetRules(t.Context(), hostnet.Rules{}); err != nil {
			t.Fatal(err)
		}
		if after := w.host.Run(t, "nft", "--handle", "list", "ruleset"); after != before {
			t.Errorf("after:\n%s\nbefore:\n%s", after, before)
		}
	}
}

func TestTwoBridges(t *testing.T) {
	w := newWorld(t)
	second := start(t, hostnet.Options{Bridge: "banger7"})
	if got := ensure(t, second); got != netip.MustParsePrefix("10.213.0.1/16") {
		t.Fatalf("the second bridge has %s", got)
	}
	settle(t, second)
	w.nat(t, true)
	before := w.host.Run(t, "nft", "list", "ruleset")
	if _, err := second.Attach(t.Context(), "00000007", hostnet.Guest{MAC: hostnet.MAC("00000007"), IP: netip.MustParseAddr("10.213.0.2"), NAT: true}); err != nil {
		t.Fatal(err)
	}
	both := w.host.Run(t, "nft", "list", "ruleset")
	if !strings.Contains(both, "table inet banger7") || !strings.HasPrefix(both, before) {
		t.Fatalf("rules:\n%s", both)
	}
	// The first turned forwarding on; the second goes on needing it.
	if err := w.client.Detach(t.Context(), "00000001"); err != nil {
		t.Fatal(err)
	}
	if out := w.host.Run(t, "sysctl", "-n", "net.ipv4.ip_forward"); out != "1\n" {
		t.Errorf("forwarding is %s", out)
	}
	w.nat(t, true)
	if err := second.Detach(t.Context(), "00000007"); err != nil {
		t.Fatal(err)
	}
	if after := w.host.Run(t, "nft", "list", "ruleset"); !strings.Contains(after, "table inet banger0") || strings.Contains(after, "banger7") {
		t.Errorf("after:\n%s\nbefore:\n%s", after, before)
	}
	if err := w.client.Detach(t.Context(), "00000001"); err != nil {
		t.Fatal(err)
	}
	if after := w.host.Run(t, "nft", "list", "ruleset"); after != "" {
		t.Errorf("after the last guest:\n%s", after)
	}
	if out := w.host.Run(t, "sysctl", "-n", "net.ipv4.ip_forward"); out != "0\n" {
		t.Errorf("forwarding is %s", out)
	}
}

// TestSpoiltRulesAreMended: rules that somebody flushed or added to our chains are as they should be
// after the next request.
func TestSpoiltRulesAreMended(t *testing.T) {
	w := newWorld(t)
	w.nat(t, true)
	want := w.host.Run(t, "nft", "list", "ruleset")
	w.host.Run(t, "nft", "flush", "chain", "inet", "banger0", "postrouting")
	w.host.Run(t, "nft", "insert", "rule", "inet", "banger0", "forward", "drop")
	w.nat(t, true)
	if got := w.host.Run(t, "nft", "list", "ruleset"); got != want {
		t.Errorf("rules:\n%s\nwant:\n%s", got, want)
	}
}
