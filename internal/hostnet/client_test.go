package hostnet_test

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/hostnet/helper"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

// TestMain is also the helper, and a daemon that only starts one, by the name it is called by.
func TestMain(m *testing.M) {
	switch filepath.Base(os.Args[0]) {
	case "banger-nethelper":
		os.Exit(helper.Main())
	case "daemon":
		daemon()
	}
	os.Exit(m.Run())
}

// as returns a link to this program under another name.
func as(t testing.TB, name string) string {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), name)
	if err := os.Symlink(self, path); err != nil {
		t.Fatal(err)
	}
	return path
}

func start(t testing.TB, o hostnet.Options) *hostnet.Client {
	t.Helper()
	need.Root(t)
	if o.HelperPath == "" {
		o.HelperPath = as(t, "banger-nethelper")
	}
	o.HelperLog = filepath.Join(t.TempDir(), "log")
	c, err := hostnet.Start(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := c.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if text, err := os.ReadFile(o.HelperLog); t.Failed() && err == nil {
			t.Logf("the helper said:\n%s", text)
		}
	})
	return c
}

func ensure(t testing.TB, c *hostnet.Client) netip.Prefix {
	t.Helper()
	address, err := c.EnsureBridge(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	return address
}

func wantKind(t *testing.T, err error, kind fault.Kind, text string) {
	t.Helper()
	if fault.KindOf(err) != kind || err == nil || !strings.Contains(err.Error(), text) {
		t.Errorf("error %v (%s), want %s with %q", err, fault.KindOf(err), kind, text)
	}
	if kind != fault.Unexpected && kind != fault.Timeout && fault.HintOf(err) == "" && !strings.Contains(text, "request") {
		t.Errorf("error %v has no hint", err)
	}
}

func TestBridgeIsMadeOnceAndAgain(t *testing.T) {
	ns := hosttest.NetNS(t)
	hosttest.Snapshot(t)
	c := start(t, hostnet.Options{})
	if err := c.Check(t.Context()); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if got := ensure(t, c); got != netip.MustParsePrefix("172.30.0.1/16") {
			t.Errorf("address %s", got)
		}
		out := ns.Run(t, "ip", "-d", "addr", "show", "banger0")
		for _, want := range []string{"inet 172.30.0.1/16", ",UP", "alias banger uid=0"} {
			if strings.Count(out, want) != 1 {
				t.Errorf("%q is not there once:\n%s", want, out)
			}
		}
	}
	if err := c.RemoveBridge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.RemoveBridge(t.Context()); err != nil {
		t.Errorf("the second time: %v", err)
	}
}

func TestHalfMadeBridgeIsCompleted(t *testing.T) {
	ns := hosttest.NetNS(t)
	c := start(t, hostnet.Options{})
	// As the very call that makes it leaves it: the user's Ethernet address and nothing else.
	ns.Run(t, "ip", "link", "add", "banger0", "address", "02:b5:00:00:00:00", "type", "bridge")
	ensure(t, c)
	// As an administrator may leave it.
	ns.Run(t, "ip", "addr", "flush", "dev", "banger0")
	ns.Run(t, "ip", "link", "set", "banger0", "down")
	ensure(t, c)
	if out := ns.Run(t, "ip", "addr", "show", "banger0"); !strings.Contains(out, "inet 172.30.0.1/16") || !strings.Contains(out, ",UP") {
		t.Errorf("bridge is not complete:\n%s", out)
	}
}

func TestForeignBridgeIsRefused(t *testing.T) {
	for _, c := range []struct{ kind, alias, want string }{
		{"bridge", "", "not made by banger"},
		{"bridge", "banger uid=1000", "of user 1000"},
		{"bridge", "banger uid=0; rm", "not made by banger"},
		{"veth", "banger uid=0", "of type veth"},
	} {
		t.Run(c.want, func(t *testing.T) {
			ns := hosttest.NetNS(t)
			ns.Run(t, "ip", "link", "add", "banger0", "type", c.kind)
			ns.Run(t, "ip", "link", "set", "banger0", "alias", c.alias)
			before := ns.Run(t, "ip", "addr")
			client := start(t, hostnet.Options{})
			_, err := client.EnsureBridge(t.Context())
			wantKind(t, err, fault.Conflict, c.want)
			wantKind(t, client.AddTAP(t.Context(), "bgr-00000001"), fault.Conflict, c.want)
			wantKind(t, client.RemoveBridge(t.Context()), fault.Conflict, c.want)
			wantKind(t, client.SetRules(t.Context(), hostnet.Rules{}), fault.Conflict, c.want)
			if after := ns.Run(t, "ip", "addr"); after != before {
				t.Errorf("it was touched:\n%s\nbefore:\n%s", after, before)
			}
		})
	}
}

func TestTwoBangersOfOneUser(t *testing.T) {
	hosttest.NetNS(t)
	one, two := start(t, hostnet.Options{Instance: "one"}), start(t, hostnet.Options{Instance: "two"})
	ensure(t, one)
	if err := one.AddTAP(t.Context(), "bgr-00000001"); err != nil {
		t.Fatal(err)
	}
	_, err := two.EnsureBridge(t.Context())
	wantKind(t, err, fault.Conflict, "another banger of yours")
	wantKind(t, two.DeleteTAP(t.Context(), "bgr-00000001"), fault.Conflict, "not yours")
	if taps, err := two.ListTAPs(t.Context()); err != nil || len(taps) != 0 {
		t.Errorf("TAPs of the other: %v %v", taps, err)
	}
	// Without devices the bridge is nobody's capital.
	if err := one.DeleteTAP(t.Context(), "bgr-00000001"); err != nil {
		t.Fatal(err)
	}
	ensure(t, two)
}

func TestClashPicksAnotherSubnet(t *testing.T) {
	ns := hosttest.NetNS(t)
	ns.Run(t, "ip", "link", "add", "vpn0", "type", "veth", "peer", "name", "vpn1")
	ns.Run(t, "ip", "link", "set", "vpn0", "up")
	ns.Run(t, "ip", "link", "set", "vpn1", "up")
	// A VPN's own routing table, and one that takes everything: only the first clashes.
	ns.Run(t, "ip", "route", "add", "172.30.7.0/24", "dev", "vpn0", "table", "51820")
	ns.Run(t, "ip", "route", "add", "0.0.0.0/1", "dev", "vpn0")
	configured := start(t, hostnet.Options{Subnet: netip.MustParsePrefix("172.30.0.0/16")})
	_, err := configured.EnsureBridge(t.Context())
	wantKind(t, err, fault.Conflict, "172.30.7.0/24 on vpn0")
	chosen := start(t, hostnet.Options{})
	if got := ensure(t, chosen); got != netip.MustParsePrefix("10.213.0.1/16") {
		t.Errorf("address %s", got)
	}
	// The bridge keeps its subnet when the route goes away: VMs may be running.
	ns.Run(t, "ip", "route", "flush", "table", "51820")
	if got := ensure(t, start(t, hostnet.Options{})); got != netip.MustParsePrefix("10.213.0.1/16") {
		t.Errorf("address %s", got)
	}
}

// TestClashWithABridgeThatIsDown: another's bridge without guests has an address and no route.
func TestClashWithABridgeThatIsDown(t *testing.T) {
	ns := hosttest.NetNS(t)
	ns.Run(t, "ip", "link", "add", "docker0", "type", "bridge")
	ns.Run(t, "ip", "addr", "add", "172.28.0.1/14", "dev", "docker0")
	c := start(t, hostnet.Options{})
	if got := ensure(t, c); got != netip.MustParsePrefix("10.213.0.1/16") {
		t.Errorf("address %s", got)
	}
	if s := c.Status(); len(s.Notices) != 1 || !strings.Contains(s.Notices[0], "172.28.0.0/14 on docker0") || !strings.Contains(s.Notices[0], "10.213.0.0/16 was chosen") {
		t.Errorf("it is not said: %v", s.Notices)
	}
}

func TestChangedSubnet(t *testing.T) {
	ns := hosttest.NetNS(t)
	ensure(t, start(t, hostnet.Options{}))
	other := start(t, hostnet.Options{Subnet: netip.MustParsePrefix("10.9.8.0/24")})
	if got := ensure(t, other); got != netip.MustParsePrefix("10.9.8.1/24") {
		t.Errorf("address %s", got)
	}
	if out := ns.Run(t, "ip", "addr", "show", "banger0"); strings.Count(out, "inet ") != 1 {
		t.Errorf("more than one address:\n%s", out)
	}
	if err := other.AddTAP(t.Context(), "bgr-00000001"); err != nil {
		t.Fatal(err)
	}
	_, err := start(t, hostnet.Options{Subnet: netip.MustParsePrefix("10.9.7.0/24")}).EnsureBridge(t.Context())
	wantKind(t, err, fault.Conflict, "devices that use it")
}

func TestTAP(t *testing.T) {
	ns := hosttest.NetNS(t)
	hosttest.Snapshot(t)
	c := start(t, hostnet.Options{Instance: "x1"})
	wantKind(t, c.AddTAP(t.Context(), "bgr-0123abcd"), fault.Conflict, "does not exist")
	ensure(t, c)
	for range 2 {
		if err := c.AddTAP(t.Context(), "bgr-0123abcd"); err != nil {
			t.Fatal(err)
		}
		checkTAP(t, ns)
	}
	// Half made, or spoilt by somebody.
	ns.Run(t, "ip", "link", "set", "bgr-0123abcd", "nomaster", "down")
	if err := c.AddTAP(t.Context(), "bgr-0123abcd"); err != nil {
		t.Fatal(err)
	}
	checkTAP(t, ns)
	if err := c.AddTAP(t.Context(), "tap-pool-17"); err != nil {
		t.Fatal(err)
	}
	taps, err := c.ListTAPs(t.Context())
	if want := []string{"bgr-0123abcd", "tap-pool-17"}; err != nil || !slices.Equal(taps, want) {
		t.Errorf("TAPs %v %v", taps, err)
	}
	wantKind(t, c.RemoveBridge(t.Context()), fault.Conflict, "has 2 devices")
	for _, name := range []string{"bgr-0123abcd", "tap-pool-17", "bgr-0123abcd", "bgr-ffffffff"} {
		if err := c.DeleteTAP(t.Context(), name); err != nil {
			t.Errorf("delete %s: %v", name, err)
		}
	}
	if err := c.RemoveBridge(t.Context()); err != nil {
		t.Error(err)
	}
}

func checkTAP(t *testing.T, ns *hosttest.NS) {
	t.Helper()
	out := ns.Run(t, "ip", "-d", "link", "show", "bgr-0123abcd")
	for _, want := range []string{"master banger0", ",UP", "persist on", "user root", "vnet_hdr on", "alias banger uid=0 instance=x1"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}

func TestForeignTAPIsRefused(t *testing.T) {
	ns := hosttest.NetNS(t)
	c := start(t, hostnet.Options{})
	ensure(t, c)
	ns.Run(t, "ip", "tuntap", "add", "bgr-00000001", "mode", "tap", "user", "1000") // another user's
	ns.Run(t, "ip", "link", "set", "bgr-00000001", "alias", "banger uid=1000")
	ns.Run(t, "ip", "tuntap", "add", "bgr-00000002", "mode", "tap", "user", "0") // not banger's
	ns.Run(t, "ip", "link", "add", "bgr-00000003", "type", "bridge")
	ns.Run(t, "ip", "link", "set", "bgr-00000003", "alias", "banger uid=0")
	before := ns.Run(t, "ip", "link")
	for i := 1; i <= 3; i++ {
		name := fmt.Sprintf("bgr-0000000%d", i)
		wantKind(t, c.AddTAP(t.Context(), name), fault.Conflict, name)
		wantKind(t, c.DeleteTAP(t.Context(), name), fault.Conflict, name)
	}
	if taps, err := c.ListTAPs(t.Context()); err != nil || len(taps) > 0 {
		t.Errorf("TAPs %v %v", taps, err)
	}
	if after := ns.Run(t, "ip", "link"); after != before {
		t.Errorf("something was touched:\n%s\nbefore:\n%s", after, before)
	}
}

func TestDeadHelperIsStartedAgain(t *testing.T) {
	hosttest.NetNS(t)
	hosttest.Snapshot(t)
	c := start(t, hostnet.Options{})
	ensure(t, c)
	first := c.HelperPID()
	if err := syscall.Kill(first, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := c.ListTAPs(t.Context()); err != nil {
		t.Fatalf("after the helper died: %v", err)
	}
	if second := c.HelperPID(); second == first || second == 0 {
		t.Errorf("helper %d, was %d", second, first)
	}
	if err := c.RemoveBridge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	_, err := c.EnsureBridge(t.Context())
	if fault.KindOf(err) != fault.Conflict {
		t.Errorf("after Close: %v", err)
	}
}

// stopped tells whether all threads of a process have come to a halt.
func stopped(t *testing.T, pid int) bool {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil || len(threads) == 0 {
		t.Fatalf("process %d has no threads: %v", pid, err)
	}
	for _, name := range threads {
		stat, err := os.ReadFile(name)
		if err == nil && !strings.Contains(string(stat), ") T ") {
			return false
		}
	}
	return true
}

func TestHangingHelper(t *testing.T) {
	hosttest.NetNS(t)
	hosttest.Snapshot(t)
	c := start(t, hostnet.Options{})
	if _, err := c.ListTAPs(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Kill(c.HelperPID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	for !stopped(t, c.HelperPID()) {
		time.Sleep(time.Millisecond)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := c.ListTAPs(ctx)
	wantKind(t, err, fault.Timeout, "did not answer")
	if _, err := c.ListTAPs(t.Context()); err != nil {
		t.Errorf("the next request: %v", err)
	}
}

func TestHelperThatAlwaysDies(t *testing.T) {
	hosttest.NetNS(t)
	c := start(t, hostnet.Options{HelperPath: "/bin/true"})
	_, err := c.ListTAPs(t.Context())
	wantKind(t, err, fault.Unexpected, "failed twice")
	missing := start(t, hostnet.Options{HelperPath: "/nonexistent/banger-nethelper"})
	_, err = missing.ListTAPs(t.Context())
	wantKind(t, err, fault.Precondition, "cannot start banger-nethelper")
	if !strings.Contains(fault.HintOf(err), "make install") {
		t.Errorf("hint %q", fault.HintOf(err))
	}
}

func TestThousandRequests(t *testing.T) {
	hosttest.NetNS(t)
	hosttest.Snapshot(t)
	c := start(t, hostnet.Options{})
	ensure(t, c)
	began := time.Now()
	for i := range 500 {
		name := fmt.Sprintf("bgr-%08x", i%5)
		if err := c.AddTAP(t.Context(), name); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
		if err := c.DeleteTAP(t.Context(), fmt.Sprintf("bgr-%08x", i*7)); err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
	}
	t.Logf("%s a request", time.Since(began)/1000)
	for i := range 5 {
		if err := c.DeleteTAP(t.Context(), fmt.Sprintf("bgr-%08x", i)); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.RemoveBridge(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// daemon is another program with a client: arguments are the helper's path and what to do. "stay"
// prints the helper's pid and stays; "work" makes a bit of everything and prints the helper's status.
func daemon() {
	ctx := context.Background()
	c, err := hostnet.Start(ctx, hostnet.Options{HelperPath: os.Args[1]})
	if err == nil {
		_, err = c.ListTAPs(ctx)
	}
	if err == nil {
		err = errors.Join(c.DeleteTAP(ctx, "bgr-00000009"), c.SetRules(ctx, hostnet.Rules{})) // so it is already
	}
	if err != nil {
		fmt.Println("without rights:", err)
		os.Exit(1)
	}
	if checked := c.Check(ctx); checked != nil {
		fmt.Printf("check: %v\n%s\n", checked, fault.HintOf(checked))
	}
	if os.Args[2] == "stay" {
		fmt.Println(c.HelperPID())
		select {}
	}
	_, err = c.EnsureBridge(ctx)
	if err == nil {
		err = errors.Join(c.AddTAP(ctx, "bgr-00000001"), c.SetRules(ctx, hostnet.Rules{Guests: []hostnet.Guest{{
			TAP: "bgr-00000001", MAC: "02:b6:00:00:00:01", IP: netip.MustParseAddr("172.30.0.2"), NAT: true,
		}}}))
	}
	if err != nil {
		fmt.Printf("%v\n%s\n", err, fault.HintOf(err))
		os.Exit(1)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", c.HelperPID()))
	fmt.Println(string(status), err)
	c.Close()
	os.Exit(0)
}

func TestHelperDiesWithTheDaemon(t *testing.T) {
	hosttest.NetNS(t)
	hosttest.Snapshot(t)
	cmd := exec.Command(as(t, "daemon"), as(t, "banger-nethelper"), "stay")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscanln(out, &pid); err != nil {
		t.Fatal(err)
	}
	helperFD, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(helperFD)
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // it was killed
	fds := []unix.PollFd{{Fd: int32(helperFD), Events: unix.POLLIN}}
	if n, err := unix.Poll(fds, 3000); n != 1 {
		t.Errorf("helper %d lives three seconds after its daemon: %v", pid, err)
		_ = syscall.Kill(pid, syscall.SIGKILL)
	}
}

// raw starts a helper and returns the daemon's end of its socket.
func raw(t *testing.T, cmd *exec.Cmd) net.Conn {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	ours, theirs := os.NewFile(uintptr(fds[0]), "ours"), os.NewFile(uintptr(fds[1]), "theirs")
	defer ours.Close()
	defer theirs.Close()
	conn, err := net.FileConn(ours)
	if err != nil {
		t.Fatal(err)
	}
	var said strings.Builder
	cmd.ExtraFiles, cmd.Stderr = []*os.File{theirs}, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		conn.Close()
		if err := cmd.Wait(); err != nil {
			t.Logf("helper: %v", err)
		}
		if t.Failed() {
			t.Logf("helper said:\n%s", said.String())
		}
	})
	conn.SetDeadline(time.Now().Add(10 * time.Second))
	return conn
}

// TestRefusals goes round the client's own checks.
func TestRefusals(t *testing.T) {
	ns := hosttest.NetNS(t)
	conn := raw(t, exec.Command(as(t, "banger-nethelper")))
	good := hostnet.Request{Version: hostnet.ProtocolVersion, Op: hostnet.OpEnsureBridge, Bridge: "banger0", Address: netip.MustParsePrefix("172.30.0.1/16")}
	if err := ask(t, conn, good).Err(); err != nil {
		t.Fatal(err)
	}
	before := ns.Run(t, "ip", "addr")
	for name, change := range map[string]func(*hostnet.Request){
		"version":           func(r *hostnet.Request) { r.Version = 1 },
		"operation":         func(r *hostnet.Request) { r.Op = "flush_everything" },
		"bridge eth0":       func(r *hostnet.Request) { r.Bridge = "eth0" },
		"bridge banger":     func(r *hostnet.Request) { r.Bridge = "banger" },
		"bridge path":       func(r *hostnet.Request) { r.Bridge = "banger0/../x" },
		"bridge newline":    func(r *hostnet.Request) { r.Bridge = "banger0\n" },
		"bridge long":       func(r *hostnet.Request) { r.Bridge = "banger0000000000" },
		"subnet public":     func(r *hostnet.Request) { r.Address = netip.MustParsePrefix("8.8.8.1/24") },
		"subnet wide":       func(r *hostnet.Request) { r.Address = netip.MustParsePrefix("10.0.0.1/8") },
		"subnet tiny":       func(r *hostnet.Request) { r.Address = netip.MustParsePrefix("10.0.0.1/30") },
		"subnet v6":         func(r *hostnet.Request) { r.Address = netip.MustParsePrefix("fd00::1/64") },
		"subnet none":       func(r *hostnet.Request) { r.Address = netip.Prefix{} },
		"address not first": func(r *hostnet.Request) { r.Address = netip.MustParsePrefix("10.1.0.7/16") },
		"instance":          func(r *hostnet.Request) { r.Instance = "x y" },
		"instance long":     func(r *hostnet.Request) { r.Instance = strings.Repeat("x", 33) },
		"tap eth0":          func(r *hostnet.Request) { r.Op, r.TAP = hostnet.OpDeleteTAP, "eth0" },
		"tap lo":            func(r *hostnet.Request) { r.Op, r.TAP = hostnet.OpDeleteTAP, "lo" },
		"tap none":          func(r *hostnet.Request) { r.Op = hostnet.OpDeleteTAP },
		"tap path":          func(r *hostnet.Request) { r.Op, r.TAP = hostnet.OpAddTAP, "bgr-../x" },
		"tap 15 characters": func(r *hostnet.Request) { r.Op, r.TAP = hostnet.OpAddTAP, "bgr-0123456789a" },
		"tap pool long":     func(r *hostnet.Request) { r.Op, r.TAP = hostnet.OpAddTAP, "tap-pool-1234567" },
		"tap upper case":    func(r *hostnet.Request) { r.Op, r.TAP = hostnet.OpAddTAP, "bgr-ABCDEF01" },
		"another user's":    func(r *hostnet.Request) { r.Op, r.TAP, r.Owner = hostnet.OpAddTAP, "bgr-00000001", 1000 },
		"negative user":     func(r *hostnet.Request) { r.Op, r.TAP, r.Owner = hostnet.OpAddTAP, "bgr-00000001", -1 },
		"rules none":        func(r *hostnet.Request) { r.Op = hostnet.OpSetRules },
		"guest public":      guest(func(g *hostnet.Guest) { g.IP = netip.MustParseAddr("1.1.1.1") }),
		"guest elsewhere":   guest(func(g *hostnet.Guest) { g.IP = netip.MustParseAddr("10.1.1.1") }),
		"guest is bridge":   guest(func(g *hostnet.Guest) { g.IP = netip.MustParseAddr("172.30.0.1") }),
		"guest broadcast":   guest(func(g *hostnet.Guest) { g.IP = netip.MustParseAddr("172.30.255.255") }),
		"guest IPv6":        guest(func(g *hostnet.Guest) { g.IP = netip.MustParseAddr("fd00::2") }),
		"guest no address":  guest(func(g *hostnet.Guest) { g.IP = netip.Addr{} }),
		"guest device":      guest(func(g *hostnet.Guest) { g.TAP = "eth0" }),
		"guest no MAC":      guest(func(g *hostnet.Guest) { g.MAC = "" }),
		"guest bad MAC":     guest(func(g *hostnet.Guest) { g.MAC = "02:b6:00:00:00:zz" }),
		"guest other MAC":   guest(func(g *hostnet.Guest) { g.MAC = "02:b5:00:00:00:00" }),
		"guest twice": func(r *hostnet.Request) {
			guest(func(*hostnet.Guest) {})(r)
			r.Rules.Guests = append(r.Rules.Guests, r.Rules.Guests[0])
		},
		"guests too many": func(r *hostnet.Request) {
			r.Op, r.Rules = hostnet.OpSetRules, &hostnet.Rules{Guests: make([]hostnet.Guest, hostnet.MaxGuests+1)}
		},
	} {
		r := good
		change(&r)
		if err := ask(t, conn, r).Err(); err == nil || fault.KindOf(err) == fault.Unexpected {
			t.Errorf("%s: %v", name, err)
		}
	}
	if after := ns.Run(t, "ip", "addr"); after != before {
		t.Errorf("something was touched:\n%s\nbefore:\n%s", after, before)
	}
	if out := ns.Run(t, "nft", "list", "ruleset"); out != "" {
		t.Errorf("rules were made:\n%s", out)
	}
}

// guest is a request for rules with one guest, changed.
func guest(change func(*hostnet.Guest)) func(*hostnet.Request) {
	return func(r *hostnet.Request) {
		g := hostnet.Guest{TAP: "tap-pool-0", MAC: "02:b6:00:00:00:01", IP: netip.MustParseAddr("172.30.0.2"), NAT: true}
		change(&g)
		r.Op, r.Rules = hostnet.OpSetRules, &hostnet.Rules{Guests: []hostnet.Guest{g}}
	}
}

func ask(t *testing.T, conn net.Conn, r hostnet.Request) hostnet.Response {
	t.Helper()
	if err := hostnet.WriteMessage(conn, r); err != nil {
		t.Fatal(err)
	}
	var response hostnet.Response
	if err := hostnet.ReadMessage(conn, &response); err != nil {
		t.Fatal(err)
	}
	return response
}

// TestFlood: a client that asks and asks and does not listen is held up, costs no memory, and is answered in the end.
func TestFlood(t *testing.T) {
	const requests = 5000
	hosttest.NetNS(t)
	cmd := exec.Command(as(t, "banger-nethelper"))
	conn := raw(t, cmd)
	if err := conn.SetDeadline(time.Now().Add(2 * time.Minute)); err != nil {
		t.Fatal(err)
	}
	sent := make(chan error, 1)
	go func() {
		var err error
		for i := 0; i < requests && err == nil; i++ {
			op := hostnet.OpListTAPs
			if i%2 == 0 {
				op = "no such thing"
			}
			err = hostnet.WriteMessage(conn, hostnet.Request{Version: hostnet.ProtocolVersion, Op: op, Bridge: "banger0"})
		}
		sent <- err
	}()
	for i := range requests {
		var response hostnet.Response
		if err := hostnet.ReadMessage(conn, &response); err != nil {
			t.Fatalf("answer %d: %v", i, err)
		}
		if refused := response.Err() != nil; refused != (i%2 == 0) {
			t.Fatalf("answer %d: %v", i, response.Err())
		}
	}
	if err := <-sent; err != nil {
		t.Fatal(err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	_, most, _ := strings.Cut(string(status), "VmHWM:")
	var kib int
	if _, err := fmt.Sscan(most, &kib); err != nil || kib > 64<<10 {
		t.Errorf("the helper took %d KiB: %v", kib, err)
	}
}

func TestGarbageEndsTheHelper(t *testing.T) {
	hosttest.NetNS(t)
	conn := raw(t, exec.Command(as(t, "banger-nethelper")))
	if _, err := conn.Write([]byte("GET / HTTP/1.1\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	var response hostnet.Response
	if err := hostnet.ReadMessage(conn, &response); err != nil || fault.KindOf(response.Err()) != fault.Usage {
		t.Fatalf("answer %v %v", response.Err(), err)
	}
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("%d bytes more", n)
	}
}

func TestHelperIsNotForPeople(t *testing.T) {
	need.Root(t)
	out, err := exec.Command(as(t, "banger-nethelper")).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != int(fault.Usage) || !strings.Contains(string(out), "bangerd starts this program") {
		t.Errorf("%v: %s", err, out)
	}
}

// TestFileCapability runs the helper as the real deployment does: an ordinary user, and a file with
// CAP_NET_ADMIN. Without the capability the user learns the command that gives it.
func TestFileCapability(t *testing.T) {
	need.Root(t)
	setcap := need.Binary(t, "setcap")
	ns := hosttest.NetNS(t)
	helper, daemon := copyOf(t, "banger-nethelper"), copyOf(t, "daemon")
	run := func() (string, error) {
		cmd := asNobody(t, daemon, helper, "work")
		text, err := cmd.CombinedOutput()
		return string(text), err
	}
	text, err := run()
	if err == nil || strings.Contains(text, "without rights") || strings.Count(text, "sudo setcap cap_net_admin,cap_net_bind_service+ep "+helper) != 2 {
		t.Errorf("without the capability: %v\n%s", err, text)
	}
	if out, err := exec.Command(setcap, "cap_net_admin,cap_net_bind_service+ep", helper).CombinedOutput(); err != nil {
		t.Fatalf("setcap: %v: %s", err, out)
	}
	if text, err = run(); err != nil || strings.Contains(text, "check:") {
		t.Fatalf("with the capability: %v\n%s", err, text)
	}
	for _, want := range []string{"NoNewPrivs:\t1", "CapEff:\t0000000000001400", "CapPrm:\t0000000000001400"} {
		if !strings.Contains(text, want) {
			t.Errorf("%q is not in\n%s", want, text)
		}
	}
	if out := ns.Run(t, "ip", "-d", "link", "show", "bgr-00000001"); !strings.Contains(out, "user nobody") || !strings.Contains(out, "master banger0") {
		t.Errorf("TAP:\n%s", out)
	}
	if out := ns.Run(t, "nft", "list", "ruleset"); !strings.Contains(out, "172.30.0.2") {
		t.Errorf("no NAT:\n%s", out)
	}
	if out := ns.Run(t, "sysctl", "-n", "net.ipv4.ip_forward"); out != "1\n" {
		t.Errorf("forwarding is %s", out)
	}
}

func TestHelperRefusesAnotherUsersSocket(t *testing.T) {
	need.Root(t)
	hosttest.NetNS(t)
	cmd := asNobody(t, copyOf(t, "banger-nethelper"))
	var said strings.Builder
	conn := raw(t, cmd) // made by root
	if n, err := conn.Read(make([]byte, 1)); err == nil {
		t.Errorf("it answers %d bytes: %s", n, said.String())
	}
}

// asNobody is a command run by an ordinary user, with a /dev/net/tun that every user may open: udev
// sees to that, and some machines have no udev.
func asNobody(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	setpriv := []string{need.Binary(t, "setpriv"), "--reuid=65534", "--regid=65534", "--clear-groups"}
	info, err := os.Stat("/dev/net/tun")
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode().Perm()&0o006 == 0o006 {
		return exec.Command(setpriv[0], append(setpriv[1:], args...)...)
	}
	node := filepath.Join(t.TempDir(), "tun")
	if err := errors.Join(unix.Mknod(node, unix.S_IFCHR, int(unix.Mkdev(10, 200))), os.Chmod(node, 0o666)); err != nil {
		t.Fatal(err)
	}
	script := `mount --bind "$1" /dev/net/tun && shift && exec "$@"`
	all := slices.Concat([]string{"-m", "sh", "-c", script, "sh", node}, setpriv, args)
	return exec.Command(need.Binary(t, "unshare"), all...)
}

// copyOf copies this program to where every user can execute it.
func copyOf(t *testing.T, name string) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "banger-hostnet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	self, err := os.Executable()
	if err == nil {
		err = os.Chmod(dir, 0o755)
	}
	path := filepath.Join(dir, name)
	if err == nil {
		var text []byte
		if text, err = os.ReadFile(self); err == nil {
			err = os.WriteFile(path, text, 0o755)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}
