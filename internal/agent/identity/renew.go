package identity

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
)

// Network is the guest's network on its way from one identity to another.
type Network struct {
	handle     *netlink.Handle // open all the time: a clone of a template need not open it
	links      []netlink.Link
	interfaces []*agentv1.Interface
}

// Silence takes the machine's interfaces down, and with them their routes and neighbours, and removes their
// addresses: until Raise nobody reaches the guest.
func Silence() (*Network, error) {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	n := &Network{handle: h}
	if n.links, err = hardware(h); err != nil {
		n.Close()
		return nil, err
	}
	for _, l := range n.links {
		if err := silence(h, l); err != nil {
			n.Close()
			return nil, fmt.Errorf("network interface %s: %w", l.Attrs().Name, err)
		}
	}
	return n, nil
}

// Close lets go of what it takes to change the network.
func (n *Network) Close() { n.handle.Close() }

func silence(h *netlink.Handle, l netlink.Link) error {
	if l.Attrs().Flags&net.FlagUp != 0 {
		if err := h.LinkSetDown(l); err != nil {
			return fmt.Errorf("set it down: %w", err)
		}
	}
	// IPv6 addresses go with the link, IPv4 ones stay.
	addrs, err := h.AddrList(l, netlink.FAMILY_ALL)
	if err != nil {
		return fmt.Errorf("list its addresses: %w", err)
	}
	for _, a := range addrs {
		if err := h.AddrDel(l, &a); err != nil {
			return fmt.Errorf("remove the address %s: %w", a.IPNet, err)
		}
	}
	return nil
}

// Prepare gives the silent interfaces their new MACs and addresses, in the order of the VMM.
func (n *Network) Prepare(interfaces []*agentv1.Interface) error {
	if len(interfaces) > len(n.links) {
		return fmt.Errorf("the guest has %d network interfaces, not %d", len(n.links), len(interfaces))
	}
	n.interfaces = interfaces
	for k, i := range interfaces {
		if err := rename(n.handle, n.links[k], i); err != nil {
			return fmt.Errorf("network interface %s: %w", i.GetMac(), err)
		}
	}
	return nil
}

func rename(h *netlink.Handle, link netlink.Link, i *agentv1.Interface) error {
	mac, err := net.ParseMAC(i.GetMac())
	if err != nil {
		return err
	}
	// Set also when it is the same: a VMM restores the filter of the device it saved.
	if err := h.LinkSetHardwareAddr(link, mac); err != nil {
		return fmt.Errorf("set the MAC: %w", err)
	}
	return prepare(h, link, i)
}

// Raise sets the interfaces up, which announces them.
func (n *Network) Raise() error {
	for k, i := range n.interfaces {
		if err := raise(n.handle, n.links[k], i); err != nil {
			return fmt.Errorf("network interface %s: %w", i.GetMac(), err)
		}
	}
	return nil
}

// hardware lists the interfaces that are devices of the machine, in the order of the VMM. Bridges, tunnels and
// the like are the user's.
func hardware(h *netlink.Handle) ([]netlink.Link, error) {
	all, err := h.LinkList()
	if err != nil {
		return nil, fmt.Errorf("list the network interfaces: %w", err)
	}
	out := slices.DeleteFunc(all, func(l netlink.Link) bool {
		_, err := os.Stat(filepath.Join("/sys/class/net", l.Attrs().Name, "device"))
		return err != nil
	})
	slices.SortFunc(out, func(a, b netlink.Link) int { return a.Attrs().Index - b.Attrs().Index })
	return out, nil
}

// Announce tells the neighbours of all interfaces that are up where their addresses are, and bridges behind
// which port: a restored guest is at another one. The kernel does so when a MAC is set, be it the same.
func Announce() error {
	h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	links, err := hardware(h)
	if err != nil {
		return err
	}
	for _, l := range links {
		if l.Attrs().Flags&net.FlagUp == 0 {
			continue
		}
		if err := h.LinkSetHardwareAddr(l, l.Attrs().HardwareAddr); err != nil {
			return fmt.Errorf("announce the network interface %s: %w", l.Attrs().Name, err)
		}
	}
	return nil
}

// announceChanges lets the kernel announce the interface's addresses when it is set up or gets another MAC, by
// gratuitous ARP and unsolicited neighbour advertisements (Documentation/networking/ip-sysctl.rst).
func announceChanges(l netlink.Link) error {
	for _, name := range []string{"ipv4/conf/%s/arp_notify", "ipv6/conf/%s/ndisc_notify"} {
		path := "/proc/sys/net/" + fmt.Sprintf(name, l.Attrs().Name)
		err := os.WriteFile(path, []byte("1"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			return fmt.Errorf("announce the network interface: %w", err)
		}
	}
	return nil
}
