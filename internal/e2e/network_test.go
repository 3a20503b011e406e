package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

// internet is a host elsewhere that knows this one's address and no private ones. It answers TCP connections with the
// address that it sees.
const internet = "198.51.100.2"

const internetPort = "7000"

// dockerRules deny by default what is forwarded, as Docker's do.
const dockerRules = `
table ip filter {
	chain DOCKER-USER {
		counter return
	}
	chain FORWARD {
		type filter hook forward priority filter; policy drop;
		counter jump DOCKER-USER
		oifname "docker0" ct state related,established counter accept
		iifname "docker0" oifname != "docker0" counter accept
	}
}
`

// newInternet puts an internet beside this namespace.
func newInternet(t *testing.T, host *hosttest.NS) {
	t.Helper()
	there := hosttest.NewNetNS(t)
	host.Run(t, "ip", "link", "add", "up0", "type", "veth", "peer", "name", "net0")
	t.Cleanup(func() { host.Run(t, "ip", "link", "delete", "up0") })
	host.Run(t, "ip", "link", "set", "net0", "netns", fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), there.FD()))
	host.Run(t, "ip", "addr", "add", "198.51.100.1/24", "dev", "up0")
	host.Run(t, "ip", "link", "set", "up0", "addrgenmode", "none", "up") // its own addresses would come later
	there.Run(t, "ip", "addr", "add", internet+"/24", "dev", "net0")
	there.Run(t, "ip", "link", "set", "net0", "up")
	// That the other end is up the kernel looks after when it has the time (net/core/link_watch.c), at the latest a second later.
	for deadline := time.Now().Add(time.Minute); strings.Contains(host.Run(t, "ip", "route", "show", "dev", "up0"), "linkdown"); {
		if time.Now().After(deadline) {
			t.Fatal("the way to the internet stays down")
		}
		time.Sleep(10 * time.Millisecond)
	}
	serve(t, there, net.JoinHostPort(internet, internetPort))
}

// serve answers TCP connections in a namespace with the peer's address.
func serve(t *testing.T, ns *hosttest.NS, address string) {
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
			fmt.Fprintln(conn, conn.RemoteAddr())
			conn.Close()
		}
	}()
	t.Cleanup(func() { l.Close(); <-done })
}

// seen connects from a guest and returns the address that the server sees, or "".
func (w *world) seen(name, host, port string) string {
	w.t.Helper()
	out := w.guest(name, fmt.Sprintf("timeout 10 bash -c 'exec 3<>/dev/tcp/%s/%s && head -n1 <&3' 2>/dev/null || true", host, port))
	address, _, _ := net.SplitHostPort(out)
	return address
}

// hostState is what a host must look like again when banger is gone: devices, addresses, routes, rules, settings
// and what listens.
func hostState(t *testing.T, host *hosttest.NS) string {
	t.Helper()
	var b strings.Builder
	for _, command := range [][]string{
		{"ip", "-brief", "link"},
		{"ip", "-brief", "addr"},
		{"ip", "route", "show", "table", "all"},
		{"ip", "rule"},
		{"nft", "--stateless", "--handle", "list", "ruleset"},
		{"sysctl", "net.ipv4.ip_forward", "net.ipv4.conf.all", "net.ipv4.conf.default", "net.ipv6.conf.all.forwarding"},
		{"ss", "--no-header", "--numeric", "--listening", "--tcp", "--udp"},
	} {
		fmt.Fprintf(&b, "%v\n%s\n", command, host.Run(t, command[0], command[1:]...))
	}
	return b.String()
}

func TestNetwork(t *testing.T) {
	need.Binary(t, "nft")
	need.Root(t)
	host := hosttest.CurrentNetNS(t)
	newInternet(t, host)
	serve(t, host, "0.0.0.0:2222")
	rules := filepath.Join(t.TempDir(), "rules")
	if err := os.WriteFile(rules, []byte(dockerRules), 0o600); err != nil {
		t.Fatal(err)
	}
	host.Run(t, "nft", "-f", rules)
	t.Cleanup(func() { host.Run(t, "nft", "delete", "table", "ip", "filter") })
	before := hostState(t, host)

	w := newWorld(t)
	w.banger("vm", "create", "web")
	gateway := "172.30.0.1"
	t.Run("NAT", func(t *testing.T) { natIsLive(t, w, gateway) })
	t.Run("siblings", func(t *testing.T) { siblingsMeet(t, w) })
	t.Run("daemon dies", func(t *testing.T) {
		want := host.Run(t, "nft", "--stateless", "list", "ruleset")
		w.killDaemon()
		w.banger("daemon", "start")
		if got := host.Run(t, "nft", "--stateless", "list", "ruleset"); got != want {
			t.Errorf("rules are\n%s\nwere\n%s", got, want)
		}
		if got := w.seen("web", internet, internetPort); got != "198.51.100.1" {
			t.Errorf("after the daemon's death web is seen as %q", got)
		}
	})
	t.Run("firewall reloads", func(t *testing.T) {
		host.Run(t, "nft", "flush", "table", "ip", "filter")
		host.Run(t, "nft", "-f", rules)
		for deadline := time.Now().Add(30 * time.Second); ; {
			if w.seen("web", internet, internetPort) != "" {
				return
			}
			if time.Now().After(deadline) {
				t.Fatal("web does not reach the internet any more")
			}
		}
	})
	if r := w.try("internal", "clean"); r.code != 4 {
		t.Errorf("clean beside a daemon: %+v", r)
	}
	w.banger("daemon", "stop", "--all-vms")
	host.Run(t, "nft", "delete", "table", "ip", "filter")
	host.Run(t, "nft", "-f", rules)
	if out := w.banger("internal", "clean"); !strings.Contains(out, "bridge banger0") {
		t.Errorf("clean says %q", out)
	}
	if after := hostState(t, host); withoutHandles(after) != withoutHandles(before) {
		t.Errorf("the host is\n%s\nwas\n%s", after, before)
	}
}

// withoutHandles leaves out the numbers that rules get anew.
func withoutHandles(state string) string {
	var b strings.Builder
	for line := range strings.Lines(state) {
		line, _, _ = strings.Cut(strings.TrimRight(line, "\n"), " # handle")
		b.WriteString(line + "\n")
	}
	return b.String()
}

// natIsLive switches NAT of a VM that runs, and tries what a guest may not reach with it.
func natIsLive(t *testing.T, w *world, gateway string) {
	if got := w.seen("web", internet, internetPort); got != "198.51.100.1" {
		t.Fatalf("with NAT web is seen as %q", got)
	}
	for _, service := range []string{gateway, "198.51.100.1"} {
		if got := w.seen("web", service, "2222"); got != "" {
			t.Errorf("web reaches the host's own service at %s as %s", service, got)
		}
	}
	w.banger("vm", "set", "web", "--nat=false")
	if got := w.seen("web", internet, internetPort); got != "" {
		t.Errorf("without NAT web is seen as %q", got)
	}
	w.banger("internal", "nat", "up", "web")
	if got := w.seen("web", internet, internetPort); got != "198.51.100.1" {
		t.Errorf("with NAT again web is seen as %q", got)
	}
	var nat struct {
		Active bool     `json:"active"`
		Opened []string `json:"opened_chains"`
	}
	if err := json.Unmarshal([]byte(w.banger("internal", "nat", "status", "web", "-o", "json")), &nat); err != nil {
		t.Fatal(err)
	}
	if !nat.Active || strings.Join(nat.Opened, ",") != "ip filter FORWARD" {
		t.Errorf("status %+v", nat)
	}
}

// siblingsMeet by both of their addresses, unless one is isolated.
func siblingsMeet(t *testing.T, w *world) {
	w.banger("vm", "create", "db", "--nat=false")
	defer w.banger("vm", "delete", "--force", "--yes", "db")
	var db struct {
		IP  string `json:"ip"`
		IP6 string `json:"ip6"`
	}
	if err := json.Unmarshal([]byte(w.banger("vm", "show", "db", "-o", "json")), &db); err != nil {
		t.Fatal(err)
	}
	answers := func(address string) bool {
		return w.guest("web", fmt.Sprintf("timeout 5 bash -c 'exec 3<>/dev/tcp/%s/22 && head -c4 <&3' 2>/dev/null || true", address)) == "SSH-"
	}
	w.banger("vm", "ssh", "db", "--", "true") // its server is up
	for _, address := range []string{db.IP, db.IP6} {
		if !answers(address) {
			t.Errorf("web does not reach db at %s", address)
		}
	}
	if got := w.seen("db", internet, internetPort); got != "" {
		t.Errorf("db has no NAT and is seen as %q", got)
	}
	w.banger("vm", "set", "db", "--isolated")
	for _, address := range []string{db.IP, db.IP6} {
		if answers(address) {
			t.Errorf("web reaches an isolated VM at %s", address)
		}
	}
	w.banger("vm", "ssh", "db", "--", "true") // the host still does
	w.banger("vm", "set", "db", "--isolated=false")
	if !answers(db.IP) {
		t.Error("web does not reach db any more")
	}
}
