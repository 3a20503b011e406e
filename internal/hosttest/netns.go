// Package hosttest gives tests a host of their own: fresh network namespaces with the real kernel
// in them, and a snapshot that fails the test when something is left behind.
package hosttest

import (
	"bytes"
	"os/exec"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"banger/internal/hosttest/need"
)

// NS is a network namespace that lives as long as the test.
type NS struct{ fd int }

// NetNS puts the rest of the test into a fresh network namespace with lo up. The test's goroutine is
// locked to its thread: sockets it opens and programs it starts are in the namespace, those of other
// goroutines are not; they need NS.Do. Parallel subtests are other goroutines too.
func NetNS(t testing.TB) *NS {
	t.Helper()
	need.Root(t)
	ns := NewNetNS(t)
	runtime.LockOSThread()
	before, err := current()
	if err != nil {
		t.Fatalf("open the network namespace: %v", err)
	}
	t.Cleanup(func() {
		defer unix.Close(before)
		if err := unix.Setns(before, unix.CLONE_NEWNET); err != nil {
			t.Errorf("return to the network namespace: %v", err) // the thread stays locked and dies with the test
			return
		}
		runtime.UnlockOSThread()
	})
	if err := unix.Setns(ns.fd, unix.CLONE_NEWNET); err != nil {
		t.Fatalf("enter a network namespace: %v", err)
	}
	return ns
}

// NewNetNS makes a fresh network namespace with lo up and does not enter it: for the other hosts of
// a test, reached with Do and Run.
func NewNetNS(t testing.TB) *NS {
	t.Helper()
	need.Root(t)
	ns := &NS{fd: -1}
	err := onThread(func() error {
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			return err
		}
		lo, err := netlink.LinkByName("lo")
		if err != nil {
			return err
		}
		if err := netlink.LinkSetUp(lo); err != nil {
			return err
		}
		ns.fd, err = current()
		return err
	})
	if err != nil {
		t.Fatalf("make a network namespace: %v", err)
	}
	t.Cleanup(func() { unix.Close(ns.fd) })
	return ns
}

// CurrentNetNS returns the network namespace that the whole process is in: that of tests whose process was given one
// of its own, and of all their goroutines.
func CurrentNetNS(t testing.TB) *NS {
	t.Helper()
	fd, err := unix.Open("/proc/self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open the network namespace: %v", err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return &NS{fd: fd}
}

// FD returns a descriptor of the namespace, for netlink.LinkSetNsFd.
func (ns *NS) FD() int { return ns.fd }

// Do runs f in the namespace, on a thread of its own, and waits for it. f must not end the test
// (t.Fatal): it runs on another goroutine.
func (ns *NS) Do(f func() error) error {
	return onThread(func() error {
		if err := unix.Setns(ns.fd, unix.CLONE_NEWNET); err != nil {
			return err
		}
		return f()
	})
}

// Run runs a program in the namespace, fails the test when it fails, and returns what it printed.
func (ns *NS) Run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := ns.Try(name, args...)
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return out
}

// Try runs a program in the namespace and returns what it printed.
func (ns *NS) Try(name string, args ...string) (string, error) {
	var out bytes.Buffer
	err := ns.Do(func() error {
		c := exec.Command(name, args...)
		c.Stdout, c.Stderr = &out, &out
		return c.Run()
	})
	return out.String(), err
}

// TAP makes a TAP device in the namespace that the test is in, which nobody holds.
func TAP(t testing.TB, name string) {
	t.Helper()
	link := netlink.Tuntap{
		LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP,
		Flags: netlink.TUNTAP_NO_PI | netlink.TUNTAP_VNET_HDR,
	}
	if err := netlink.LinkAdd(&link); err != nil {
		t.Fatalf("make the TAP device %s: %v", name, err)
	}
	for _, queue := range link.Fds {
		_ = queue.Close()
	}
}

// onThread runs f on a thread that ends with it, whatever f did to the thread.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		done <- f()
	}()
	return <-done
}

func current() (int, error) {
	return unix.Open("/proc/thread-self/ns/net", unix.O_RDONLY|unix.O_CLOEXEC, 0)
}
