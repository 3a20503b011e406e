package identity

import (
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

func TestConnections(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0016 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0
   1: 02001EAC:0016 01001EAC:D431 01 00000000:00000000 02:00000000 00000000     0        0 2 1 0
   2: 0100007F:1F90 0100007F:D431 01 00000000:00000000 02:00000000 00000000     0        0 3 1 0
   3: 02001EAC:D432 08080808:0050 02 00000000:00000000 02:00000000 00000000     0        0 4 1 0
   4: 02001EAC:D433 08080808:0050 06 00000000:00000000 02:00000000 00000000     0        0 0 1 0
   5: 0000000000000000FFFF000002001EAC:0016 0000000000000000FFFF000001001EAC:0017 08 00000000:00000000 02:00000000 0 0 0 5 1 0
   6: 000080FE000000000000000001000000:0016 000080FE000000000000000002000000:0017 01 00000000:00000000 02:00000000 0 0 0 6 1 0
   7: nonsense
`
	got := ""
	for _, c := range connections(table) {
		got += fmt.Sprintln(c.local, c.remote)
	}
	const want = "172.30.0.2:22 172.30.0.1:54321\n172.30.0.2:54322 8.8.8.8:80\n172.30.0.2:22 172.30.0.1:23\n[fe80::1]:22 [fe80::2]:23\n"
	if got != want {
		t.Errorf("got\n%swant\n%s", got, want)
	}
}

// awaitRoutes waits until addresses of the namespace are reached: the kernel makes the routes to those of IPv6 a moment
// after their link is up.
func awaitRoutes(t *testing.T, ns *hosttest.NS, addresses ...string) {
	t.Helper()
	var routes string
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		routes = ns.Run(t, "ip", "route", "show", "table", "local") + ns.Run(t, "ip", "-6", "route", "show", "table", "local")
		if !slices.ContainsFunc(addresses, func(a string) bool { return !strings.Contains(routes, "local "+a+" ") }) {
			return
		}
	}
	t.Fatalf("no routes to %v:\n%s", addresses, routes)
}

// Connections over the network end, whichever their addresses; what is within the guest goes on, and who listens does.
func TestHangUp(t *testing.T) {
	need.Root(t)
	need.Binary(t, "ip")
	ns := hosttest.NetNS(t)
	for _, command := range []string{
		"link set lo up", "link add va type veth peer name vb", "addr add 10.9.0.1/24 dev va", "addr add fd09::1/64 dev va nodad",
		"link set va addrgenmode none", "link set vb addrgenmode none", "link set va up", "link set vb up",
		"addr add fe80::a/64 dev va nodad", "addr add fe80::b/64 dev vb nodad",
	} {
		ns.Run(t, "ip", strings.Fields(command)...)
	}
	awaitRoutes(t, ns, "10.9.0.1", "fd09::1", "fe80::a", "fe80::b")
	ends := map[string]bool{"10.9.0.1": true, "fd09::1": true, "fe80::b": true, "127.0.0.1": false, "::1": false}
	connected := map[string]net.Conn{}
	err := ns.Do(func() error {
		va, err1 := netlink.LinkByName("va")
		vb, err2 := netlink.LinkByName("vb")
		if err := errors.Join(err1, err2); err != nil {
			return err
		}
		for host := range ends {
			from, to := host, host
			if host == "fe80::b" { // which is reached by the other end
				from, to = fmt.Sprint(host, "%", vb.Attrs().Index), fmt.Sprint(host, "%", va.Attrs().Index)
			}
			l, err := net.Listen("tcp", net.JoinHostPort(from, "0"))
			if err != nil {
				return err
			}
			defer l.Close()
			to = net.JoinHostPort(to, fmt.Sprint(l.Addr().(*net.TCPAddr).Port))
			c, err := net.DialTimeout("tcp", to, 5*time.Second)
			if err != nil {
				return err
			}
			defer c.Close()
			connected[to] = c
		}
		if err := HangUp(); err != nil {
			return err
		}
		for to, c := range connected {
			host, _, _ := net.SplitHostPort(to)
			host, _, _ = strings.Cut(host, "%")
			_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
			_, err := c.Read(make([]byte, 1))
			if ended := !errors.Is(err, os.ErrDeadlineExceeded); ended != ends[host] {
				t.Errorf("%s: %v", to, err)
			}
			again, err := net.DialTimeout("tcp", to, 5*time.Second)
			if err != nil {
				t.Errorf("%s does not listen any more: %v", to, err)
				continue
			}
			again.Close()
		}
		return nil
	})
	need.Kernel(t, "way to end connections (INET_DIAG_DESTROY)", !errors.Is(err, syscall.EOPNOTSUPP))
	if err != nil {
		t.Fatal(err)
	}
}
