package hosttest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"testing"
)

// Port finds a TCP port of 127.0.0.1 that is free, and that stays so until the test uses it: it is none of those that the kernel
// gives to whoever asks for any, as other tests do all the time.
func Port(t testing.TB) uint16 {
	t.Helper()
	text, err := os.ReadFile("/proc/sys/net/ipv4/ip_local_port_range") // Documentation/networking/ip-sysctl.rst
	if err != nil {
		t.Fatal(err)
	}
	const least = 10000
	given := 0 // the first of those
	if _, err := fmt.Sscan(string(text), &given); err != nil || given <= least {
		t.Fatalf("the kernel gives ports from %q on, %v", text, err)
	}
	for range 100 {
		port := least + rand.IntN(given-least)
		l, err := net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", port))
		if err != nil {
			continue
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		return uint16(port)
	}
	t.Fatal("no port is free")
	return 0
}
