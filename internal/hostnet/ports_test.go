package hostnet_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/hostnet"
	"banger/internal/hosttest"
	"banger/internal/vm"
)

// port is a guest that speaks raw Ethernet on its TAP device, as a VMM does.
type port struct {
	tun *os.File
	mac net.HardwareAddr
	ip  netip.Addr
}

// vnetHeader is what precedes each frame of a device with IFF_VNET_HDR: a virtio_net_hdr.
const vnetHeader = 10

func openPort(t *testing.T, ns *hosttest.NS, tap string, g hostnet.Guest) *port {
	t.Helper()
	p := &port{ip: g.IP}
	err := ns.Do(func() error {
		fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
		if err != nil {
			return err
		}
		request, err := unix.NewIfreq(tap)
		if err == nil {
			request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
			err = unix.IoctlIfreq(fd, unix.TUNSETIFF, request)
		}
		p.tun = os.NewFile(uintptr(fd), "tun") // after the ioctl: only then the poller takes it
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.tun.Close() })
	if p.mac, err = net.ParseMAC(g.MAC); err != nil {
		t.Fatal(err)
	}
	return p
}

func (p *port) send(t *testing.T, frame []byte) {
	t.Helper()
	if _, err := p.tun.Write(append(make([]byte, vnetHeader), frame...)); err != nil {
		t.Fatal(err)
	}
}

// sees tells whether a frame with this text arrives. Those before it are thrown away.
func (p *port) sees(t *testing.T, text string, patience time.Duration) bool {
	t.Helper()
	if err := p.tun.SetReadDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	buffer := make([]byte, 2048)
	for {
		n, err := p.tun.Read(buffer)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return false
		}
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(buffer[:n], []byte(text)) {
			return true
		}
	}
}

var everybody = net.HardwareAddr{0xff, 0xff, 0xff, 0xff, 0xff, 0xff}

func ethernet(to, from net.HardwareAddr, kind uint16, body []byte) []byte {
	frame := append(append(append([]byte{}, to...), from...), binary.BigEndian.AppendUint16(nil, kind)...)
	return append(frame, body...)
}

// arp announces an address: RFC 826, with a text behind it as Ethernet's padding.
func arp(from net.HardwareAddr, ip netip.Addr, text string) []byte {
	body := []byte{0, 1, 8, 0, 6, 4, 0, 1}
	body = append(append(body, from...), ip.AsSlice()...)
	body = append(append(body, make([]byte, 6)...), ip.AsSlice()...)
	return ethernet(everybody, from, unix.ETH_P_ARP, append(body, text...))
}

// ipv4 is a UDP packet to all, which a host would hardly take, but a bridge carries.
func ipv4(from net.HardwareAddr, ip netip.Addr, text string) []byte {
	body := []byte{0x45, 0, 0, 0, 0, 0, 0, 0, 64, unix.IPPROTO_UDP, 0, 0}
	body = append(append(body, ip.AsSlice()...), 255, 255, 255, 255)
	body = append(body, 0, 9, 0, 9, 0, 0, 0, 0)
	body = append(body, text...)
	binary.BigEndian.PutUint16(body[2:], uint16(len(body)))
	binary.BigEndian.PutUint16(body[24:], uint16(len(body)-20))
	sum := uint32(0)
	for i := 0; i < 20; i += 2 {
		sum += uint32(binary.BigEndian.Uint16(body[i:]))
	}
	for sum > 0xffff {
		sum = sum&0xffff + sum>>16
	}
	binary.BigEndian.PutUint16(body[10:], ^uint16(sum))
	return ethernet(everybody, from, unix.ETH_P_IP, body)
}

func ipv6(from net.HardwareAddr, ip netip.Addr, text string) []byte {
	body := []byte{0x60, 0, 0, 0, 0, byte(len(text)), 59, 64} // no next header
	body = append(append(body, ip.AsSlice()...), netip.MustParseAddr("ff02::1").AsSlice()...)
	return ethernet(everybody, from, unix.ETH_P_IPV6, append(body, text...))
}

// neighbour is an ICMPv6 message to all about an address (RFC 4861 4); its checksum is of no interest to a bridge.
func neighbour(from net.HardwareAddr, ip netip.Addr, kind byte, about netip.Addr, text string) []byte {
	message := append([]byte{kind, 0, 0, 0, 0, 0, 0, 0}, about.AsSlice()...)
	message = append(message, text...)
	body := []byte{0x60, 0, 0, 0, 0, byte(len(message)), unix.IPPROTO_ICMPV6, 255}
	body = append(append(body, ip.AsSlice()...), netip.MustParseAddr("ff02::1").AsSlice()...)
	return ethernet(everybody, from, unix.ETH_P_IPV6, append(body, message...))
}

// withOptions puts a header of padding options between an IPv6 header and what follows it (RFC 8200 4.2).
func withOptions(frame []byte) []byte {
	const ethernetLen, next = 14, 6
	ip, rest := append([]byte{}, frame[:ethernetLen+40]...), frame[ethernetLen+40:]
	options := []byte{ip[ethernetLen+next], 0, 1, 4, 0, 0, 0, 0}
	ip[ethernetLen+next] = unix.IPPROTO_DSTOPTS
	ip[ethernetLen+5] += byte(len(options))
	return append(append(ip, options...), rest...)
}

// twoPorts is a bridge with two guests on it.
func twoPorts(t *testing.T) (*hosttest.NS, *hostnet.Client, [2]*port) {
	t.Helper()
	ns := hosttest.NetNS(t)
	c := start(t, hostnet.Options{})
	ensure(t, c)
	settle(t, c)
	var ports [2]*port
	for i, id := range []vm.ID{"0000000a", "0000000b"} {
		g := hostnet.Guest{MAC: hostnet.MAC(id), IP: netip.AddrFrom4([4]byte{172, 30, 0, byte(i + 2)})}
		tap, err := c.Attach(t.Context(), id, g)
		if err != nil {
			t.Fatal(err)
		}
		ports[i] = openPort(t, ns, tap, g)
	}
	forwarding(t, ports)
	return ns, c, ports
}

// forwarding waits until frames pass both ways: the kernel notices a moment later that a device has somebody at its other
// end, and its port drops them until then.
func forwarding(t *testing.T, ports [2]*port) {
	t.Helper()
	for from := range ports {
		to, passes := ports[1-from], false
		for end := time.Now().Add(hopeful); !passes && time.Now().Before(end); {
			ports[from].send(t, arp(ports[from].mac, ports[from].ip, "forwarding"))
			passes = to.sees(t, "forwarding", hopeless)
		}
		if !passes {
			t.Fatalf("port %d does not come to forward", from)
		}
	}
}

// TestGuestsUseTheirOwnAddresses: what comes from others' is dropped at the port.
func TestGuestsUseTheirOwnAddresses(t *testing.T) {
	_, _, p := twoPorts(t)
	a, b := p[0], p[1]
	other := net.HardwareAddr{2, 0xb6, 9, 9, 9, 9}
	link, gateway6 := netip.MustParseAddr("fe80::1"), vm.IPv6(netip.MustParseAddr("172.30.0.1"))
	for name, c := range map[string]struct {
		frame []byte
		want  bool
	}{
		"arp":           {arp(a.mac, a.ip, "arp "), true},
		"arp probe":     {arp(a.mac, netip.IPv4Unspecified(), "arp probe "), true},
		"arp stolen":    {arp(a.mac, b.ip, "arp stolen "), false},
		"arp gateway":   {arp(a.mac, netip.MustParseAddr("172.30.0.1"), "arp gateway "), false},
		"ip":            {ipv4(a.mac, a.ip, "ip "), true},
		"ip stolen":     {ipv4(a.mac, b.ip, "ip stolen "), false},
		"ip nobody's":   {ipv4(a.mac, netip.MustParseAddr("192.0.2.1"), "ip nobody's "), false},
		"mac":           {ipv4(other, a.ip, "mac "), false},
		"mac stolen":    {ipv4(b.mac, a.ip, "mac stolen "), false},
		"ip6":           {ipv6(a.mac, vm.IPv6(a.ip), "ip6 "), true},
		"ip6 link":      {ipv6(a.mac, netip.MustParseAddr("fe80::1"), "ip6 link "), true},
		"ip6 detection": {ipv6(a.mac, netip.IPv6Unspecified(), "ip6 detection "), true},
		"ip6 stolen":    {ipv6(a.mac, vm.IPv6(b.ip), "ip6 stolen "), false},
		"nd own":        {neighbour(a.mac, vm.IPv6(a.ip), 136, vm.IPv6(a.ip), "nd own "), true},
		"nd own, link":  {neighbour(a.mac, link, 136, link, "nd own, link "), true},
		"nd question":   {neighbour(a.mac, link, 135, vm.IPv6(b.ip), "nd question "), true},
		"nd stolen":     {neighbour(a.mac, vm.IPv6(a.ip), 136, vm.IPv6(b.ip), "nd stolen "), false},
		"nd gateway":    {neighbour(a.mac, link, 136, gateway6, "nd gateway "), false},
		"nd hidden":     {withOptions(neighbour(a.mac, link, 136, gateway6, "nd hidden ")), false},
		"router":        {neighbour(a.mac, link, 134, link, "router "), false},
		"router hidden": {withOptions(neighbour(a.mac, link, 134, link, "router hidden ")), false},
		"redirect":      {neighbour(a.mac, link, 137, gateway6, "redirect "), false},
		"another kind":  {ethernet(everybody, a.mac, 0x88cc, []byte("another kind ")), false},
		"tagged":        {ethernet(everybody, a.mac, unix.ETH_P_8021Q, append([]byte{0, 5, 8, 0}, "tagged "...)), false},
	} {
		a.send(t, c.frame)
		a.send(t, arp(a.mac, a.ip, "after "+name))
		// Frames stay in order: what did not come before the next one never does.
		got := b.sees(t, "after "+name, hopeful)
		if !got {
			t.Fatalf("%s: nothing comes any more", name)
		}
		a.send(t, c.frame)
		a.send(t, arp(a.mac, a.ip, "last "+name))
		if got := b.seesBefore(t, name+" ", "last "+name); got != c.want {
			t.Errorf("%s: passed %t, want %t", name, got, c.want)
		}
	}
}

// seesBefore tells whether a frame with this text arrives before one with the other.
func (p *port) seesBefore(t *testing.T, text, end string) bool {
	t.Helper()
	if err := p.tun.SetReadDeadline(time.Now().Add(hopeful)); err != nil {
		t.Fatal(err)
	}
	buffer, seen := make([]byte, 2048), false
	for {
		n, err := p.tun.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(buffer[:n], []byte(end)) {
			return seen
		}
		seen = seen || bytes.Contains(buffer[:n], []byte(text))
	}
}

// TestIsolatedGuests see no siblings, and siblings do not see them; the change is live.
func TestIsolatedGuests(t *testing.T) {
	_, c, p := twoPorts(t)
	isolate := func(i int, id vm.ID, on bool) {
		if _, err := c.Attach(t.Context(), id, hostnet.Guest{MAC: hostnet.MAC(id), IP: p[i].ip, Isolated: on}); err != nil {
			t.Fatal(err)
		}
	}
	talk := func(from, to *port, text string, want bool) {
		t.Helper()
		from.send(t, arp(from.mac, from.ip, text))
		patience := hopeless
		if want {
			patience = hopeful
		}
		if got := to.sees(t, text, patience); got != want {
			t.Errorf("%s: passed %t, want %t", text, got, want)
		}
	}
	talk(p[0], p[1], "as siblings", true)
	isolate(0, "0000000a", true)
	talk(p[0], p[1], "from an isolated one", false)
	talk(p[1], p[0], "to an isolated one", false)
	isolate(0, "0000000a", false)
	talk(p[1], p[0], "as siblings again", true)
}

// TestATemplateReachesNothing: it has a device and no address.
func TestATemplateReachesNothing(t *testing.T) {
	ns, c, p := twoPorts(t)
	tap, err := c.Attach(t.Context(), "0000000c", hostnet.Guest{})
	if err != nil {
		t.Fatal(err)
	}
	nobody := openPort(t, ns, tap, hostnet.Guest{MAC: hostnet.MAC("0000000c")})
	nobody.send(t, arp(nobody.mac, netip.MustParseAddr("172.30.0.9"), "hello"))
	if p[0].sees(t, "hello", hopeless) {
		t.Error("a guest sees it")
	}
}
