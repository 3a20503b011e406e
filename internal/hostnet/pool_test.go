package hostnet_test

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/hosttest"
	"banger/internal/vm"
)

func someGuest(n int) (vm.ID, hostnet.Guest) {
	id := vm.ID(fmt.Sprintf("%08x", n))
	return id, hostnet.Guest{MAC: hostnet.MAC(id), IP: netip.AddrFrom4([4]byte{172, 30, 1, byte(n)}), NAT: n%2 == 0}
}

func attach(t testing.TB, c *hostnet.Client, n int) string {
	t.Helper()
	id, g := someGuest(n)
	tap, err := c.Attach(t.Context(), id, g)
	if err != nil {
		t.Fatal(err)
	}
	return tap
}

func detach(t testing.TB, c *hostnet.Client, n int) {
	t.Helper()
	id, _ := someGuest(n)
	if err := c.Detach(t.Context(), id); err != nil {
		t.Fatal(err)
	}
}

// ready waits until so many devices wait.
func ready(t *testing.T, c *hostnet.Client, n int) {
	t.Helper()
	eventually(t, func() bool { return c.Status().Ready == n })
}

func TestPool(t *testing.T) {
	ns := hosttest.NetNS(t)
	hosttest.Snapshot(t)
	c := start(t, hostnet.Options{Pool: 3})
	settle(t, c)
	if s := c.Status(); s.Ready != 0 || s.Wanted != 3 {
		t.Errorf("before there is a bridge: %+v", s)
	}
	ensure(t, c)
	ready(t, c, 3)
	waiting, err := c.ListTAPs(t.Context())
	if err != nil || !slices.Equal(waiting, []string{"tap-pool-0", "tap-pool-1", "tap-pool-2"}) {
		t.Fatalf("waiting %v %v", waiting, err)
	}
	tap := attach(t, c, 1)
	if !slices.Contains(waiting, tap) {
		t.Errorf("got %s, and %v waited", tap, waiting)
	}
	if again := attach(t, c, 1); again != tap {
		t.Errorf("the second time it is %s, was %s", again, tap)
	}
	ready(t, c, 3)
	detach(t, c, 1) // one too many now
	detach(t, c, 1)
	taps, err := c.ListTAPs(t.Context())
	if err != nil || len(taps) != 3 {
		t.Fatalf("left %v %v", taps, err)
	}
	// Somebody takes one away, and another one off the bridge: neither is handed out.
	ns.Run(t, "ip", "link", "delete", taps[2])
	ns.Run(t, "ip", "link", "set", taps[1], "nomaster")
	used := []string{attach(t, c, 1), attach(t, c, 2), attach(t, c, 3)}
	for _, tap := range used {
		if out := ns.Run(t, "ip", "link", "show", tap); !strings.Contains(out, "master banger0") {
			t.Errorf("%s is not on the bridge: %s", tap, out)
		}
	}
	for n := range 3 {
		detach(t, c, n+1)
	}
	ready(t, c, 3)
	removed, err := c.Clean(t.Context())
	if err != nil || len(removed) != 4 {
		t.Errorf("cleaned %v, %v", removed, err)
	}
}

// TestPoolAfterACrash: waiting devices are taken up, those of running VMs are left to them, others go.
func TestPoolAfterACrash(t *testing.T) {
	ns := hosttest.NetNS(t)
	hosttest.Snapshot(t)
	c := start(t, hostnet.Options{Pool: 2})
	settle(t, c)
	ensure(t, c)
	tap := attach(t, c, 1)
	lost := attach(t, c, 2) // a VM whose start a dead daemon did not finish
	if err := c.AddTAP(t.Context(), "bgr-00000009"); err != nil {
		t.Fatal(err)
	}
	ready(t, c, 2)
	if err := unix.Kill(c.HelperPID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	before, _ := c.ListTAPs(t.Context())
	rules := ns.Run(t, "nft", "list", "table", "inet", "banger0")

	next := start(t, hostnet.Options{Pool: 2})
	id, g := someGuest(1)
	g.TAP = tap
	if _, err := next.EnsureBridge(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got, err := next.Attach(t.Context(), id, g); err != nil || got != tap {
		t.Fatalf("taken up with %s, has %s: %v", got, tap, err)
	}
	if now := ns.Run(t, "nft", "list", "table", "inet", "banger0"); now != rules {
		t.Errorf("before all VMs are known the rules are\n%s\nwere\n%s", now, rules)
	}
	removed, err := next.Settle(t.Context(), map[vm.ID]hostnet.Guest{id: g})
	if err != nil || !slices.Equal(removed, []string{"bgr-00000009"}) {
		t.Errorf("removed %v, %v", removed, err)
	}
	ready(t, next, 2)
	taps, err := next.ListTAPs(t.Context())
	if err != nil || len(taps) != 3 || !slices.Contains(taps, tap) {
		t.Errorf("left %v of %v (lost %s), %v", taps, before, lost, err)
	}
	if now := ns.Run(t, "nft", "list", "table", "bridge", "banger0"); strings.Count(now, `"`+tap+`"`) == 0 || strings.Contains(now, "172.30.1.2") {
		t.Errorf("rules:\n%s", now)
	}
	detach(t, next, 1)
	if _, err := next.Clean(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestCleanSparesWhatIsUsed: a VM runs, so nothing is removed.
func TestCleanSparesWhatIsUsed(t *testing.T) {
	ns := hosttest.NetNS(t)
	c := start(t, hostnet.Options{Pool: 1})
	settle(t, c)
	ensure(t, c)
	_, g := someGuest(1)
	p := openPort(t, ns, attach(t, c, 1), g)
	ready(t, c, 1)
	_, err := c.Clean(t.Context())
	wantKind(t, err, fault.Conflict, "in use")
	if taps, err := c.ListTAPs(t.Context()); err != nil || len(taps) != 2 {
		t.Errorf("left %v %v", taps, err)
	}
	p.tun.Close()
	if _, err := c.Clean(t.Context()); err != nil {
		t.Error(err)
	}
	if out := ns.Run(t, "nft", "list", "ruleset"); out != "" {
		t.Errorf("rules are left:\n%s", out)
	}
}

// TestManyAtOnce: VMs that come and go all at once have devices of their own each.
func TestManyAtOnce(t *testing.T) {
	hosttest.NetNS(t)
	hosttest.Snapshot(t)
	c := start(t, hostnet.Options{Pool: 4})
	settle(t, c)
	ensure(t, c)
	for range 2 {
		var mu sync.Mutex
		taps := map[string]bool{}
		var wg sync.WaitGroup
		for n := 1; n <= 20; n++ {
			wg.Go(func() {
				id, g := someGuest(n)
				tap, err := c.Attach(t.Context(), id, g)
				mu.Lock()
				defer mu.Unlock()
				if err != nil || taps[tap] {
					t.Errorf("guest %d has %s: %v", n, tap, err)
				}
				taps[tap] = true
			})
		}
		wg.Wait()
		for n := 1; n <= 20; n++ {
			wg.Go(func() {
				id, _ := someGuest(n)
				if err := c.Detach(t.Context(), id); err != nil {
					t.Errorf("guest %d: %v", n, err)
				}
			})
		}
		wg.Wait()
	}
	ready(t, c, 4)
	if _, err := c.Clean(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestTwoDaemonsOnOneBridge: the second learns whose it is, and changes nothing.
func TestTwoDaemonsOnOneBridge(t *testing.T) {
	ns := hosttest.NetNS(t)
	one := start(t, hostnet.Options{Instance: "one", Pool: 1})
	settle(t, one)
	ensure(t, one)
	attach(t, one, 2)
	ready(t, one, 1)
	look := func() string {
		var b strings.Builder
		for line := range strings.Lines(ns.Run(t, "ip", "-brief", "link")) {
			f := strings.Fields(line) // name, state, address, flags: that a device is down the kernel finds out in its own time
			fmt.Fprintln(&b, f[0], f[2], strings.Contains(f[3], ",UP"))
		}
		return b.String() + ns.Run(t, "nft", "list", "ruleset")
	}
	before := look()
	two := start(t, hostnet.Options{Instance: "two", Pool: 1})
	_, err := two.Settle(t.Context(), nil)
	wantKind(t, err, fault.Conflict, "another banger of yours")
	_, err = two.EnsureBridge(t.Context())
	wantKind(t, err, fault.Conflict, "another banger of yours")
	id, g := someGuest(3)
	if _, err := two.Attach(t.Context(), id, g); fault.KindOf(err) != fault.Conflict {
		t.Errorf("attached: %v", err)
	}
	_, err = two.Clean(t.Context())
	wantKind(t, err, fault.Conflict, "another banger of yours")
	if after := look(); after != before {
		t.Errorf("after:\n%s\nbefore:\n%s", after, before)
	}
}

// TestTwoBangersAtOnce: names of TAP devices are the whole host's, and two helpers look for free ones at the same time.
func TestTwoBangersAtOnce(t *testing.T) {
	hosttest.NetNS(t)
	var wg sync.WaitGroup
	for bridge, subnet := range map[string]string{"banger1": "10.1.0.0/16", "banger2": "10.2.0.0/16"} {
		c := start(t, hostnet.Options{Instance: bridge, Bridge: bridge, Subnet: netip.MustParsePrefix(subnet)})
		ensure(t, c)
		for n := range 30 {
			wg.Go(func() {
				if _, err := c.Attach(t.Context(), vm.ID(fmt.Sprintf("%08x", n)), hostnet.Guest{}); err != nil {
					t.Errorf("%s: %v", bridge, err)
				}
			})
		}
	}
	wg.Wait()
}
