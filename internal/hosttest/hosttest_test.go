package hosttest

import (
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"banger/internal/hosttest/need"
)

func TestNetNSIsFreshAndLeft(t *testing.T) {
	need.Root(t)
	outside := nsName(t)
	t.Run("inside", func(t *testing.T) {
		ns := NetNS(t)
		if nsName(t) == outside {
			t.Fatal("still in the namespace of before")
		}
		if out := ns.Run(t, "readlink", "/proc/self/ns/net"); strings.TrimSpace(out) != nsName(t) {
			t.Errorf("a program started in the namespace is in %s", out)
		}
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatalf("lo is not up: %v", err)
		}
		l.Close()
	})
	t.Run("after", func(t *testing.T) {
		// The subtest's thread may not be the one of before; the namespace must be.
		if got := nsName(t); got != outside {
			t.Errorf("namespace is %s, was %s", got, outside)
		}
	})
}

func TestDoRunsInTheOther(t *testing.T) {
	here := NetNS(t)
	other := NewNetNS(t)
	link := func() error { return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "there0"}}) }
	if err := other.Do(link); err != nil {
		t.Fatal(err)
	}
	if _, err := netlink.LinkByName("there0"); err == nil {
		t.Error("the device is here")
	}
	if out, err := other.Try("ip", "link", "show", "there0"); err != nil {
		t.Errorf("the device is not there: %v %s", err, out)
	}
	if out, err := here.Try("ip", "link", "show", "there0"); err == nil {
		t.Errorf("the device is here: %s", out)
	}
}

func TestStockSeesWhatIsLeft(t *testing.T) {
	NetNS(t)
	dir := t.TempDir()
	before, err := take(t.Name(), []string{dir})
	if err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(dir, "left"))
	if err != nil {
		t.Fatal(err)
	}
	bridge := &netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "left0"}}
	if err := netlink.LinkAdd(bridge); err != nil {
		t.Fatal(err)
	}
	after, err := take(t.Name(), []string{dir})
	if err != nil {
		t.Fatal(err)
	}
	diff := difference(before, after)
	for _, want := range []string{"+ fd " + f.Name(), "+ file " + f.Name(), "+ device bridge left0"} {
		if !strings.Contains(diff, want) {
			t.Errorf("%q is not in the difference:\n%s", want, diff)
		}
	}
	f.Close()
	os.Remove(f.Name())
	if err := netlink.LinkDel(bridge); err != nil {
		t.Fatal(err)
	}
	if diff := waitFor(t.Name(), before, []string{dir}); diff != "" {
		t.Errorf("all is gone, still a difference:\n%s", diff)
	}
}

func TestSnapshotOfACleanTest(t *testing.T) {
	NetNS(t)
	Snapshot(t, t.TempDir())
}

func nsName(t *testing.T) string {
	t.Helper()
	name, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	return name
}

// TestMountsOfOtherTests are theirs.
func TestMountsOfOtherTests(t *testing.T) {
	need.Root(t)
	other, mine := filepath.Join(os.TempDir(), "TestOfSomebodyElse", strconv.Itoa(os.Getpid())), t.TempDir()
	if err := os.MkdirAll(other, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.Remove(other)
		_ = os.Remove(filepath.Dir(other)) // another run's may be there
	})
	for _, dir := range []string{other, mine} {
		if err := unix.Mount("none", dir, "tmpfs", 0, ""); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
	}
	stock, err := take(t.Name(), nil)
	if err != nil || stock["mount "+mine+" tmpfs"] != 1 || stock["mount "+other+" tmpfs"] != 0 {
		t.Errorf("ours %d, another's %d: %v", stock["mount "+mine+" tmpfs"], stock["mount "+other+" tmpfs"], err)
	}
}

// A host may give away more ports than usual, or all.
func TestPortsBesideThoseThatAreGiven(t *testing.T) {
	for given, want := range map[[2]int][2]int{
		{32768, 60999}: {10000, 32767}, // the kernel's own choice
		{10000, 60000}: {60001, 65535},
		{1024, 65535}:  {1024, 65535},
		{1024, 9000}:   {10000, 65535},
	} {
		if from, to := others(given[0], given[1]); [2]int{from, to} != want {
			t.Errorf("beside %v: %d to %d, want %v", given, from, to, want)
		}
	}
	if p := Port(t); p == 0 {
		t.Error("none")
	}
}
