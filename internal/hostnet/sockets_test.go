package hostnet_test

import (
	"net"
	"net/netip"
	"testing"
	"time"

	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/hosttest"
)

// TestListenDNS: the sockets are on port 53 of the bridge, of both kinds, and work once the helper is gone.
func TestListenDNS(t *testing.T) {
	ns := hosttest.NetNS(t)
	c := start(t, hostnet.Options{})
	address := ensure(t, c)
	udp, tcp, err := c.ListenDNS(t.Context(), address)
	if err != nil {
		t.Fatal(err)
	}
	defer tcp.Close()
	defer udp.Close()
	for _, a := range []string{udp.LocalAddr().String(), tcp.Addr().String()} {
		if a != "172.30.0.1:53" {
			t.Errorf("a socket on %s", a)
		}
	}
	_, _, err = c.ListenDNS(t.Context(), address)
	wantKind(t, err, fault.Conflict, "another name server listens on 172.30.0.1:53")
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	go func() {
		packet := make([]byte, 64)
		if n, from, err := udp.ReadFrom(packet); err == nil {
			_, _ = udp.WriteTo(packet[:n], from)
		}
		if conn, err := tcp.Accept(); err == nil {
			_, _ = conn.Write([]byte("world"))
			conn.Close()
		}
	}()
	if got := exchange(t, ns, "udp", "172.30.0.1:53", "hello"); got != "hello" {
		t.Errorf("over UDP: %q", got)
	}
	if got := exchange(t, ns, "tcp", "172.30.0.1:53", "hello"); got != "world" {
		t.Errorf("over TCP: %q", got)
	}
}

// exchange sends a text in a namespace and returns what comes back.
func exchange(t *testing.T, ns *hosttest.NS, network, address, text string) string {
	t.Helper()
	answer := make([]byte, 64)
	n := 0
	err := ns.Do(func() error {
		conn, err := net.DialTimeout(network, address, hopeful)
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := conn.Write([]byte(text)); err != nil {
			return err
		}
		conn.SetReadDeadline(time.Now().Add(hopeful))
		n, err = conn.Read(answer)
		return err
	})
	if err != nil {
		t.Error(err)
	}
	return string(answer[:n])
}

// TestListenDNSElsewhere: the right to bind port 53 is for the bridge's own address alone.
func TestListenDNSElsewhere(t *testing.T) {
	ns := hosttest.NetNS(t)
	c := start(t, hostnet.Options{})
	_, _, err := c.ListenDNS(t.Context(), netip.MustParsePrefix("172.30.0.1/16"))
	wantKind(t, err, fault.Conflict, "does not exist")
	ensure(t, c)
	ns.Run(t, "ip", "addr", "add", "10.7.0.1/24", "dev", "lo")
	for address, want := range map[string]fault.Kind{
		"10.7.0.1/24": fault.Conflict, "127.0.0.1/8": fault.Usage, "0.0.0.0/0": fault.Usage, "172.30.0.2/16": fault.Usage,
	} {
		if _, _, err := c.ListenDNS(t.Context(), netip.MustParsePrefix(address)); fault.KindOf(err) != want {
			t.Errorf("%s: %v, want %s", address, err, want)
		}
	}
}
