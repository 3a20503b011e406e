package identity

import (
	"bytes"
	"fmt"
	"net"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
)

const (
	linkWait = 10 * time.Second
	linkPoll = 5 * time.Millisecond
)

// ConfigureNetwork gives the interfaces their static addresses.
func ConfigureNetwork(interfaces []*agentv1.Interface) error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find the loopback interface: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set the loopback interface up: %w", err)
	}
	for _, i := range interfaces {
		if err := configureInterface(h, i); err != nil {
			return fmt.Errorf("network interface %s: %w", i.GetMac(), err)
		}
	}
	return nil
}

func configureInterface(h *netlink.Handle, i *agentv1.Interface) error {
	mac, err := net.ParseMAC(i.GetMac())
	if err != nil {
		return err
	}
	link, err := waitForLink(h, mac)
	if err != nil {
		return err
	}
	if err := announceChanges(link); err != nil {
		return err
	}
	if err := prepare(h, link, i); err != nil {
		return err
	}
	return raise(h, link, i)
}

// prepare gives the interface its MTU and addresses. It need not be up.
func prepare(h *netlink.Handle, link netlink.Link, i *agentv1.Interface) error {
	if mtu := int(i.GetMtu()); mtu != 0 && mtu != link.Attrs().MTU {
		if err := h.LinkSetMTU(link, mtu); err != nil {
			return fmt.Errorf("set the MTU %d: %w", mtu, err)
		}
	}
	for _, a := range i.GetAddresses() {
		addr, err := netlink.ParseAddr(a)
		if err != nil {
			return fmt.Errorf("address %q: %w", a, err)
		}
		if addr.IP.To4() == nil { // it is nobody else's: usable at once
			addr.Flags |= unix.IFA_F_NODAD
		}
		if err := h.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("add the address %s: %w", a, err)
		}
	}
	return nil
}

// raise sets the interface up and adds its route. One without addresses stays down: by its IPv6 link-local
// address it would answer all the same, and a guest that is to become a template has nobody to answer.
func raise(h *netlink.Handle, link netlink.Link, i *agentv1.Interface) error {
	if len(i.GetAddresses()) == 0 {
		return nil
	}
	if err := h.LinkSetUp(link); err != nil {
		return fmt.Errorf("set it up: %w", err)
	}
	if i.GetGateway() == "" {
		return nil
	}
	gateway := net.ParseIP(i.GetGateway())
	if gateway == nil {
		return fmt.Errorf("gateway %q is no address", i.GetGateway())
	}
	if err := h.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: gateway}); err != nil {
		return fmt.Errorf("add the route by %s: %w", gateway, err)
	}
	return nil
}

func waitForLink(h *netlink.Handle, mac net.HardwareAddr) (netlink.Link, error) {
	for end := time.Now().Add(linkWait); ; time.Sleep(linkPoll) {
		links, err := h.LinkList()
		if err != nil {
			return nil, err
		}
		for _, l := range links {
			if bytes.Equal(l.Attrs().HardwareAddr, mac) {
				return l, nil
			}
		}
		if time.Now().After(end) {
			return nil, fmt.Errorf("it did not appear within %v", linkWait)
		}
	}
}
