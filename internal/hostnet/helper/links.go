package helper

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/paths"
	"banger/internal/vm"
)

// find returns a device, or nil when there is none of that name.
func find(name string) (netlink.Link, error) {
	link, err := netlink.LinkByName(name)
	if errors.As(err, &netlink.LinkNotFoundError{}) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("look for device %s: %w", name, err)
	}
	return link, nil
}

// ensureBridge makes the bridge, or completes it, so that it is the user's, has this address and no
// other, and is up.
func ensureBridge(name string, address netip.Prefix, me owner) (response hostnet.Response, err error) {
	link, err := find(name)
	if err != nil {
		return response, err
	}
	if link == nil {
		if err := checkRoutes(address, name); err != nil {
			return response, err
		}
		if link, err = makeBridge(name, me); err != nil {
			return response, err
		}
	}
	if err := claimBridge(link, me); err != nil {
		return response, err
	}
	if err := setAddress(link, address); err != nil {
		return response, err
	}
	notice, err := bridgeIPv6(link, vm.IPv6Prefix(address))
	if err != nil {
		return response, err
	}
	if notice != "" {
		response.Notices = []string{notice}
	}
	if err := netlink.LinkSetUp(link); err != nil {
		return response, fmt.Errorf("set bridge %s up: %w", name, err)
	}
	return response, nil
}

func makeBridge(name string, me owner) (netlink.Link, error) {
	attrs := netlink.NewLinkAttrs()
	attrs.Name, attrs.HardwareAddr = name, me.bridgeMAC()
	if err := netlink.LinkAdd(&netlink.Bridge{LinkAttrs: attrs}); err != nil {
		return nil, fmt.Errorf("make bridge %s: %w", name, err)
	}
	link, err := find(name)
	if err == nil && link == nil {
		err = fmt.Errorf("bridge %s vanished while it was made", name)
	}
	return link, err
}

// claimBridge refuses a bridge that is not the user's, and marks one that is: a bridge that was only
// just made, and one that another banger of this user left without devices.
func claimBridge(link netlink.Link, me owner) error {
	name := link.Attrs().Name
	err := checkBridge(link, me)
	if err == nil {
		if me.instance == "" || link.Attrs().Alias == me.mark() {
			return nil
		}
	} else {
		mine, perr := abandoned(link, me)
		if perr != nil {
			return perr
		}
		if !mine {
			return err
		}
	}
	if err := netlink.LinkSetAlias(link, me.mark()); err != nil {
		return fmt.Errorf("mark bridge %s: %w", name, err)
	}
	return nil
}

// abandoned tells whether a bridge has no devices and is the user's by its mark, or by its Ethernet
// address while it has no mark at all.
func abandoned(link netlink.Link, me owner) (bool, error) {
	if link.Type() != "bridge" {
		return false, nil
	}
	alias := link.Attrs().Alias
	marked, ok := parseMark(alias)
	halfMade := alias == "" && bytes.Equal(link.Attrs().HardwareAddr, me.bridgeMAC())
	if !halfMade && (!ok || marked.uid != me.uid) {
		return false, nil
	}
	n, err := ports(link)
	return err == nil && n == 0, err
}

// checkBridge refuses a device that is no bridge of this owner's.
func checkBridge(link netlink.Link, me owner) error {
	name := link.Attrs().Name
	conflict := func(why string) error {
		return fault.New(fault.Conflict, "bridge %s %s", name, why).
			WithHint(`configure another bridge, such as "banger1", or remove this one: sudo ip link delete %s`, name)
	}
	if link.Type() != "bridge" {
		return conflict("is taken by a device of type " + link.Type())
	}
	marked, ok := parseMark(link.Attrs().Alias)
	switch {
	case !ok:
		return conflict("exists and was not made by banger")
	case marked.uid != me.uid:
		return conflict(fmt.Sprintf("belongs to the banger of user %d", marked.uid))
	case !me.sameInstance(marked):
		return conflict("is used by another banger of yours")
	}
	return nil
}

// ourBridge returns an existing bridge of this owner's.
func ourBridge(name string, me owner) (netlink.Link, error) {
	link, err := find(name)
	if err != nil {
		return nil, err
	}
	if link == nil {
		return nil, fault.New(fault.Conflict, "bridge %s does not exist", name).WithHint("restart the daemon: banger daemon restart")
	}
	return link, checkBridge(link, me)
}

// checkRoutes keeps a user from drawing traffic away from where this host sends it.
func checkRoutes(address netip.Prefix, bridge string) error {
	routes, err := hostnet.ReadRoutes()
	if err != nil {
		return err
	}
	if r, clash := hostnet.Clash(address.Masked(), routes, bridge); clash {
		return hostnet.ClashFault(address.Masked(), r)
	}
	return nil
}

// setAddress gives a bridge this IPv4 address and takes others away. While devices are on the
// bridge, guests may be using the address it has.
func setAddress(link netlink.Link, address netip.Prefix) error {
	name := link.Attrs().Name
	have, err := hostnet.List(func() ([]netlink.Addr, error) { return netlink.AddrList(link, netlink.FAMILY_V4) })
	if err != nil {
		return fmt.Errorf("read the addresses of bridge %s: %w", name, err)
	}
	want := &net.IPNet{IP: address.Addr().AsSlice(), Mask: net.CIDRMask(address.Bits(), 32)}
	found := false
	for _, a := range have {
		if a.IPNet.String() == want.String() {
			found = true
			continue
		}
		n, err := ports(link)
		if err != nil {
			return err
		}
		if n > 0 {
			return fault.New(fault.Conflict, "bridge %s has address %s and %d devices that use it", name, a.IPNet, n).
				WithHint("stop all VMs before you change the subnet")
		}
		if err := netlink.AddrDel(link, &a); err != nil {
			return fmt.Errorf("remove address %s of bridge %s: %w", a.IPNet, name, err)
		}
	}
	if found {
		return nil
	}
	if err := checkRoutes(address, name); err != nil {
		return err
	}
	if err := netlink.AddrAdd(link, &netlink.Addr{IPNet: want}); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("give address %s to bridge %s: %w", address, name, err)
	}
	return nil
}

// ports counts the devices on a bridge.
func ports(bridge netlink.Link) (int, error) {
	links, err := hostnet.List(netlink.LinkList)
	if err != nil {
		return 0, fmt.Errorf("list network devices: %w", err)
	}
	n := 0
	for _, l := range links {
		if l.Attrs().MasterIndex == bridge.Attrs().Index {
			n++
		}
	}
	return n, nil
}

// removeBridge takes away a bridge; that of a missing one succeeds.
func removeBridge(name string, me owner) error {
	link, err := find(name)
	if err != nil || link == nil {
		return err
	}
	if err := checkBridge(link, me); err != nil {
		return err
	}
	n, err := ports(link)
	if err != nil {
		return err
	}
	if n > 0 {
		return fault.New(fault.Conflict, "bridge %s has %d devices on it", name, n).WithHint("stop all VMs first")
	}
	if err := netlink.LinkDel(link); err != nil {
		return fmt.Errorf("remove bridge %s: %w", name, err)
	}
	return nil
}

// addTAP makes a TAP device, or completes it, so that it is the user's, on the bridge and up.
func addTAP(name, bridgeName string, me owner) error {
	bridge, err := ourBridge(bridgeName, me)
	if err != nil {
		return err
	}
	link, err := find(name)
	if err != nil {
		return err
	}
	if link != nil {
		if err := checkTAP(link, me); err != nil {
			return err
		}
		return attach(link, bridge)
	}
	return makeTAP(name, bridge, me)
}

// freeTries is how often another name is looked for when somebody else was quicker: helpers of other users take names
// of the same pool.
const freeTries = 50

// addFreeTAP makes a TAP device on the bridge with a name that no device on this host has.
func addFreeTAP(bridgeName string, me owner) (name string, err error) {
	bridge, err := ourBridge(bridgeName, me)
	if err != nil {
		return "", err
	}
	for range freeTries {
		if name, err = freeTAP(); err != nil {
			return "", err
		}
		if err = makeTAP(name, bridge, me); !errors.Is(err, unix.EBUSY) {
			return name, err
		}
	}
	return "", err
}

// makeTAP makes a TAP device; EBUSY says that there is one of that name. It becomes persistent last: until then it goes
// with its descriptor, whatever happens to us.
func makeTAP(name string, bridge netlink.Link, me owner) error {
	bridgeName := bridge.Attrs().Name
	if n, err := ports(bridge); err != nil {
		return err
	} else if n >= hostnet.MaxGuests {
		return fault.New(fault.Conflict, "bridge %s has %d devices, and takes no more", bridgeName, n).WithHint("stop some VMs")
	}
	tun, err := openTAP(name, me.uid)
	if err != nil {
		return err
	}
	defer tun.Close()
	link, err := find(name)
	if err != nil {
		return err
	}
	if link == nil {
		return fmt.Errorf("TAP device %s vanished while it was made", name)
	}
	if err := netlink.LinkSetAlias(link, me.mark()); err != nil {
		return fmt.Errorf("mark TAP device %s: %w", name, err)
	}
	if err := attach(link, bridge); err != nil {
		return err
	}
	if err := unix.IoctlSetInt(int(tun.Fd()), unix.TUNSETPERSIST, 1); err != nil {
		return fmt.Errorf("make TAP device %s persistent: %w", name, err)
	}
	return nil
}

// maxPoolName is the highest number in the name of a TAP device of the pool.
const maxPoolName = 99999

// freeTAP returns the first name of the pool's that no device on this host has, whoever's it is.
func freeTAP() (string, error) {
	links, err := hostnet.List(netlink.LinkList)
	if err != nil {
		return "", fmt.Errorf("list network devices: %w", err)
	}
	taken := map[string]bool{}
	for _, l := range links {
		taken[l.Attrs().Name] = true
	}
	for n := range maxPoolName + 1 {
		if name := fmt.Sprintf("%s%d", paths.PoolPrefix, n); !taken[name] {
			return name, nil
		}
	}
	return "", fault.New(fault.Conflict, "no name is free for a TAP device").WithHint("see: ip -brief link")
}

// openTAP makes a TAP device that its owner may open; it must not exist yet.
func openTAP(name string, uid int) (*os.File, error) {
	tun, err := os.OpenFile(tunDevice, os.O_RDWR, 0)
	if err != nil {
		return nil, tunFault(err)
	}
	request, err := unix.NewIfreq(name)
	if err == nil {
		// VMMs use offload headers; IFF_TUN_EXCL makes sure that nobody's device is taken over.
		request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR | unix.IFF_TUN_EXCL)
		err = unix.IoctlIfreq(int(tun.Fd()), unix.TUNSETIFF, request)
	}
	if err == nil {
		err = unix.IoctlSetInt(int(tun.Fd()), unix.TUNSETOWNER, uid)
	}
	if err != nil {
		tun.Close()
		return nil, fmt.Errorf("make TAP device %s: %w", name, err)
	}
	return tun, nil
}

func tunFault(err error) error {
	f := fault.Wrap(fault.Precondition, err, "cannot make TAP devices")
	if errors.Is(err, os.ErrPermission) {
		return f.WithHint("let every user open the device, as most distributions do: sudo chmod 0666 %s", tunDevice)
	}
	return f.WithHint("load the kernel's module: sudo modprobe tun")
}

// attach puts a TAP device on the bridge and sets it up, as far as that is not so yet.
func attach(link, bridge netlink.Link) error {
	attrs := link.Attrs()
	if attrs.MasterIndex != bridge.Attrs().Index {
		if err := netlink.LinkSetMasterByIndex(link, bridge.Attrs().Index); err != nil {
			return fmt.Errorf("put TAP device %s on bridge %s: %w", attrs.Name, bridge.Attrs().Name, err)
		}
	}
	if attrs.Flags&net.FlagUp == 0 {
		if err := netlink.LinkSetUp(link); err != nil {
			return fmt.Errorf("set TAP device %s up: %w", attrs.Name, err)
		}
	}
	return nil
}

// checkTAP refuses a device that is no TAP device of this owner's.
func checkTAP(link netlink.Link, me owner) error {
	tap, ok := link.(*netlink.Tuntap)
	if ok && tap.Mode == netlink.TUNTAP_MODE_TAP && int(tap.Owner) == me.uid && me.owns(link) {
		return nil
	}
	return fault.New(fault.Conflict, "device %s exists and is not yours", link.Attrs().Name).
		WithHint("see whose it is: ip -details link show %s", link.Attrs().Name)
}

// deleteTAP removes a TAP device; that of a missing one succeeds.
func deleteTAP(name string, me owner) error {
	link, err := find(name)
	if err != nil || link == nil {
		return err
	}
	if err := checkTAP(link, me); err != nil {
		return err
	}
	if err := netlink.LinkDel(link); err != nil && !errors.Is(err, unix.ENODEV) {
		return fmt.Errorf("remove TAP device %s: %w", name, err)
	}
	return nil
}

// listTAPs returns the owner's TAP devices.
func listTAPs(me owner) ([]string, error) {
	links, err := hostnet.List(netlink.LinkList)
	if err != nil {
		return nil, fmt.Errorf("list network devices: %w", err)
	}
	var names []string
	for _, l := range links {
		if hostnet.CheckTAP(l.Attrs().Name) == nil && checkTAP(l, me) == nil {
			names = append(names, l.Attrs().Name)
		}
	}
	return names, nil
}
