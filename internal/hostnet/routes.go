package hostnet

import (
	"errors"
	"fmt"
	"net"
	"net/netip"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"banger/internal/fault"
)

// Route is a destination that the host already sends somewhere.
type Route struct {
	Destination netip.Prefix
	Device      string // may be empty
}

// Candidates are the subnets tried in this order when none is configured. The first is banger's
// default; the others lie where neither Docker (172.17/16 upwards), libvirt (192.168.122/24) nor
// usual home routers and VPNs (10.0/16, 10.8/16, 192.168.0/24, 192.168.1/24) do.
var Candidates = []netip.Prefix{
	netip.MustParsePrefix("172.30.0.0/16"),
	netip.MustParsePrefix("10.213.0.0/16"),
	netip.MustParsePrefix("172.24.0.0/16"),
	netip.MustParsePrefix("10.87.0.0/16"),
	netip.MustParsePrefix("192.168.213.0/24"),
	netip.MustParsePrefix("192.168.87.0/24"),
}

// defaultBits is the longest prefix that counts as a default route: VPNs that take all traffic
// write it as 0.0.0.0/1 and 128.0.0.0/1, or in some more pieces.
const defaultBits = 7

// Clash returns the first route that overlaps subnet and is not the bridge's own.
func Clash(subnet netip.Prefix, routes []Route, bridge string) (Route, bool) {
	for _, r := range routes {
		if r.Device != bridge && r.Destination.Bits() > defaultBits && r.Destination.Overlaps(subnet) {
			return r, true
		}
	}
	return Route{}, false
}

// PickSubnet returns the first of the candidates that clashes with no route, and why those before
// it were passed over.
func PickSubnet(candidates []netip.Prefix, routes []Route, bridge string) (netip.Prefix, string, error) {
	why := ""
	for _, c := range candidates {
		r, clash := Clash(c, routes, bridge)
		if !clash {
			return c, why, nil
		}
		if why == "" {
			why = clashText(c, r)
		}
	}
	return netip.Prefix{}, why, fault.New(fault.Conflict, "every subnet banger knows clashes with a route of this host").
		WithHint("configure a private subnet that this host does not use")
}

// ClashFault says that a subnet cannot be had.
func ClashFault(subnet netip.Prefix, r Route) error {
	return fault.New(fault.Conflict, "%s", clashText(subnet, r)).
		WithHint("configure another private subnet, or none to let banger choose")
}

func clashText(subnet netip.Prefix, r Route) string {
	if r.Device == "" {
		return fmt.Sprintf("subnet %s clashes with the route to %s", subnet, r.Destination)
	}
	return fmt.Sprintf("subnet %s clashes with the route to %s on %s", subnet, r.Destination, r.Device)
}

// ReadRoutes returns the IPv4 unicast routes of all routing tables (VPNs have tables of their own)
// and the subnets of all addresses, also of devices that are down, such as another's bridge without guests. It needs no
// rights.
func ReadRoutes() ([]Route, error) {
	names, err := deviceNames()
	if err != nil {
		return nil, err
	}
	all, err := List(func() ([]netlink.Route, error) {
		return netlink.RouteListFiltered(netlink.FAMILY_V4, &netlink.Route{Table: unix.RT_TABLE_UNSPEC}, netlink.RT_FILTER_TABLE)
	})
	if err != nil {
		return nil, fmt.Errorf("read the routes of this host: %w", err)
	}
	var routes []Route
	for _, r := range all {
		if r.Dst == nil || r.Type == unix.RTN_BROADCAST || r.Type == unix.RTN_MULTICAST {
			continue
		}
		ip, ok := netip.AddrFromSlice(r.Dst.IP)
		bits, _ := r.Dst.Mask.Size()
		if ip = ip.Unmap(); ok && ip.Is4() && !ip.IsLoopback() {
			routes = append(routes, Route{Destination: netip.PrefixFrom(ip, bits), Device: names[r.LinkIndex]})
		}
	}
	addresses, err := List(func() ([]netlink.Addr, error) { return netlink.AddrList(nil, netlink.FAMILY_V4) })
	if err != nil {
		return nil, fmt.Errorf("read the addresses of this host: %w", err)
	}
	for _, a := range addresses {
		if p := prefixOf(a.IPNet); p.Addr().Is4() && !p.Addr().IsLoopback() {
			routes = append(routes, Route{Destination: p.Masked(), Device: names[a.LinkIndex]})
		}
	}
	return routes, nil
}

func deviceNames() (map[int]string, error) {
	links, err := List(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("read the network devices of this host: %w", err)
	}
	names := map[int]string{}
	for _, l := range links {
		names[l.Attrs().Index] = l.Attrs().Name
	}
	return names, nil
}

// bridgeAddress returns the address of an existing bridge that a bridge of ours may have; the zero
// prefix when there is no such bridge, or it has none. It needs no rights.
func bridgeAddress(name string) (netip.Prefix, error) {
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return netip.Prefix{}, nil
	}
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("look for bridge %s: %w", name, err)
	}
	addresses, err := List(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_V4) })
	if err != nil {
		return netip.Prefix{}, fmt.Errorf("read the addresses of bridge %s: %w", name, err)
	}
	for _, a := range addresses {
		if p := prefixOf(a.IPNet); checkAddress(p) == nil {
			return p, nil
		}
	}
	return netip.Prefix{}, nil
}

func prefixOf(n *net.IPNet) netip.Prefix {
	ip, _ := netip.AddrFromSlice(n.IP)
	bits, _ := n.Mask.Size()
	return netip.PrefixFrom(ip.Unmap(), bits)
}
