package vm

import (
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"banger/internal/fault"
)

// MaxPorts bounds the forwards of one VM.
const MaxPorts = 64

// Port leads TCP connections to an address of the host into a VM.
type Port struct {
	Host  netip.AddrPort `json:"host"`
	Guest uint16         `json:"guest"`
}

// loopback is where a port listens when nobody says otherwise.
var loopback = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// String returns the form that ParsePort reads: "127.0.0.1:8080:80".
func (p Port) String() string { return p.Host.String() + ":" + strconv.Itoa(int(p.Guest)) }

const portHint = "write it like 8080:80, or 127.0.0.1:8080:80"

// ParsePort reads a forward as people write it: HOSTPORT:GUESTPORT, ADDRESS:HOSTPORT:GUESTPORT, or one number for both.
// An IPv6 address stands in brackets. "/tcp" may follow.
func ParsePort(text string) (Port, error) {
	rest, protocol, given := strings.Cut(strings.TrimSpace(text), "/")
	if given && protocol != "tcp" {
		return Port{}, fault.New(fault.Usage, "%q: only TCP ports are forwarded", shorten(text)).WithHint(portHint)
	}
	address, rest, err := cutAddress(rest)
	if err != nil {
		return Port{}, fault.New(fault.Usage, "%q is no port to forward: %v", shorten(text), err).WithHint(portHint)
	}
	host, guest, both := strings.Cut(rest, ":")
	if !both {
		guest = host
	}
	h, err1 := strconv.ParseUint(host, 10, 16)
	g, err2 := strconv.ParseUint(guest, 10, 16)
	if err1 != nil || err2 != nil || h == 0 || g == 0 {
		return Port{}, fault.New(fault.Usage, "%q is no port to forward: ports are numbers from 1 to 65535", shorten(text)).WithHint(portHint)
	}
	return Port{Host: netip.AddrPortFrom(address, uint16(h)), Guest: uint16(g)}, nil
}

// cutAddress takes the address off the front of a forward.
func cutAddress(text string) (netip.Addr, string, error) {
	address, rest := "", text
	switch {
	case strings.HasPrefix(text, "["):
		end := strings.Index(text, "]:")
		if end < 0 {
			return netip.Addr{}, "", fault.New(fault.Usage, "a bracket is not closed")
		}
		address, rest = text[1:end], text[end+2:]
	case strings.Count(text, ":") > 1:
		address, rest, _ = strings.Cut(text, ":")
	default:
		return loopback, text, nil
	}
	a, err := netip.ParseAddr(address)
	if err != nil || a.Zone() != "" {
		return netip.Addr{}, "", fault.New(fault.Usage, "%q is no address of this host", shorten(address))
	}
	return a.Unmap(), rest, nil
}

// CheckPorts refuses forwards that cannot be, or not together.
func CheckPorts(ports []Port) error {
	if len(ports) > MaxPorts {
		return fault.New(fault.Usage, "%d forwarded ports are too many for one VM", len(ports)).WithHint("use at most %d", MaxPorts)
	}
	for i, p := range ports {
		if !p.Host.IsValid() || p.Host.Port() == 0 || p.Guest == 0 {
			return fault.New(fault.Usage, "%s is no port to forward", p).WithHint(portHint)
		}
		if slices.ContainsFunc(ports[:i], func(other Port) bool { return other.Host == p.Host }) {
			return fault.New(fault.Usage, "port %s is forwarded twice", p.Host).WithHint("one host port leads to one guest port")
		}
	}
	return nil
}
