package hosttest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"testing"
)

// Port finds a TCP port of 127.0.0.1 that is free, and that stays so until the test uses it: it is none of those that the kernel
// gives to whoever asks for any, as other tests do all the time. Where the kernel gives them all, it is one of them.
func Port(t testing.TB) uint16 {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range") // Documentation/networking/ip-sysctl.rst
	if err != nil {
		t.Fatal(err)
	}
	var first, last int // of those
	if _, err := fmt.Sscan(string(text), &first, &last); err != nil {
		t.Fatalf("the kernel gives ports %q: %v", text, err)
	}
	from, to := others(first, last)
	for range 100 {
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", from+rand.IntN(to-from+1)))
		if err != nil {
			continue
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		return l.Addr().(*net.TCPAddr).AddrPort().Port()
	}
	t.Fatal("no port is free")
	return 0
}

// others returns the larger range of ports, from least on, that is beside the given one; else that one.
func others(first, last int) (from, to int) {
	const least, most = 10_000, 1<<16 - 1
	below, above := first-least, most-last
	switch {
	case below > 0 && below >= above:
		return least, first - 1
	case above > 0:
		return max(least, last+1), most
	}
	return first, last
}
