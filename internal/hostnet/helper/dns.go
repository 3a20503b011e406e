package helper

import (
	"net/netip"

	"github.com/vishvananda/netlink"

	"banger/internal/fault"
	"banger/internal/hostnet"
)

// listenDNS binds port 53 of the address that a bridge of this owner's has.
func listenDNS(bridge string, address netip.Prefix, me owner) (hostnet.Response, error) {
	link, err := ourBridge(bridge, me)
	if err != nil {
		return hostnet.Response{}, err
	}
	addresses, err := netlink.AddrList(link, netlink.FAMILY_V4)
	if err != nil {
		return hostnet.Response{}, err
	}
	for _, a := range addresses {
		if ip, ok := netip.AddrFromSlice(a.IP.To4()); ok && ip == address.Addr() {
			return hostnet.ListenDNSOn(ip)
		}
	}
	return hostnet.Response{}, fault.New(fault.Conflict, "bridge %s has not the address %s", bridge, address.Addr()).
		WithHint("restart the daemon: banger daemon restart")
}
