// Package hostnet gives VMs a place in the host's network: one bridge, a TAP device per VM, and
// NAT for those that want it. The daemon has no rights of its own: a Client asks banger-nethelper,
// which holds CAP_NET_ADMIN, over a socketpair. Everything asked for is a state, not a change:
// asking twice is harmless, and what is half made is completed.
package hostnet

import (
	"context"
	"net/netip"
	"regexp"
	"strconv"
	"strings"

	"banger/internal/fault"
	"banger/internal/vm"
)

// Network is what VMs need of the host's network.
type Network interface {
	// EnsureBridge makes the bridge and returns its address with the length of the subnet, such as
	// 172.30.0.1/16: the address is the guests' gateway, Masked() is the subnet.
	EnsureBridge(context.Context) (netip.Prefix, error)
	// Attach gives a VM a TAP device on the bridge, and makes the host's rules for it what the guest says. It
	// returns the device's name: that in the guest or, when the guest names none, one that was waiting, or a new one.
	// Of a VM that is attached already the device stays. On error nothing has changed. EnsureBridge comes first.
	Attach(context.Context, vm.ID, Guest) (tap string, err error)
	// Detach takes the VM's device and rules back. That of a VM which is not attached succeeds.
	Detach(context.Context, vm.ID) error
	// Settle comes once, before the first Attach of a VM that starts: attached are those that an earlier daemon left
	// running, with their devices. Devices that belong to none of them are kept for VMs to come, or
	// removed; what was removed and should not have been there is returned, sorted. Until then, Attach and Detach only take note.
	Settle(ctx context.Context, attached map[vm.ID]Guest) (removed []string, err error)
}

// maxName is the longest name of a network device: IFNAMSIZ holds 16 bytes with the closing NUL.
const maxName = 15

var (
	bridgeName   = regexp.MustCompile(`^banger[0-9]{1,3}$`)
	tapName      = regexp.MustCompile(`^(bgr-[0-9a-f]{8}|tap-pool-[0-9]{1,5})$`)
	instanceName = regexp.MustCompile(`^[a-z0-9]{0,32}$`)
	vmID         = regexp.MustCompile(`^[0-9a-f]{8}$`)
)

// CheckBridge refuses a name that no bridge of banger has.
func CheckBridge(name string) error {
	if len(name) <= maxName && bridgeName.MatchString(name) {
		return nil
	}
	return fault.New(fault.Usage, "%q is no name for a bridge", clip(name)).
		WithHint(`a bridge is named "banger" and a number of one to three digits, such as banger0`)
}

// CheckTAP refuses a name that no TAP device of banger has.
func CheckTAP(name string) error {
	if len(name) <= maxName && tapName.MatchString(name) {
		return nil
	}
	return fault.New(fault.Usage, "%q is no name for a TAP device", clip(name)).
		WithHint(`a TAP device is named "bgr-" and eight hex digits, or "tap-pool-" and a number`)
}

// CheckInstance refuses what cannot tell one banger of a user from another: up to 32 lower-case letters and digits.
func CheckInstance(name string) error {
	if instanceName.MatchString(name) {
		return nil
	}
	return fault.New(fault.Usage, "%q is no name for an instance", clip(name))
}

// private lists the address ranges of RFC 1918.
var private = []netip.Prefix{
	netip.MustParsePrefix("10.0.0.0/8"), netip.MustParsePrefix("172.16.0.0/12"), netip.MustParsePrefix("192.168.0.0/16"),
}

// CheckSubnet refuses a subnet that guests cannot have: it must be private (RFC 1918), between /16
// and /28, and written with its network address.
func CheckSubnet(subnet netip.Prefix) error {
	hint := "choose a private IPv4 subnet between /16 and /28, such as 172.30.0.0/16"
	if !subnet.IsValid() || !subnet.Addr().Is4() {
		return fault.New(fault.Usage, "subnet %s is no IPv4 subnet", subnet).WithHint("%s", hint)
	}
	if subnet.Bits() < 16 || subnet.Bits() > 28 {
		return fault.New(fault.Usage, "subnet %s is too large or too small", subnet).WithHint("%s", hint)
	}
	if subnet != subnet.Masked() {
		return fault.New(fault.Usage, "subnet %s has host bits set", subnet).WithHint("did you mean %s?", subnet.Masked())
	}
	for _, p := range private {
		if p.Contains(subnet.Addr()) {
			return nil
		}
	}
	return fault.New(fault.Usage, "subnet %s is not private", subnet).WithHint("%s", hint)
}

// Gateway returns the first address of a subnet, the bridge's own, with the subnet's length.
func Gateway(subnet netip.Prefix) netip.Prefix {
	return netip.PrefixFrom(subnet.Masked().Addr().Next(), subnet.Bits())
}

// Allocate returns the lowest address of subnet that is free: never the network's own, the gateway
// (the first), the broadcast address, or one that is taken. When there is none it is a Conflict fault.
func Allocate(subnet netip.Prefix, taken map[netip.Addr]bool) (netip.Addr, error) {
	subnet = subnet.Masked()
	if err := CheckSubnet(subnet); err != nil {
		return netip.Addr{}, err
	}
	for a := Gateway(subnet).Addr().Next(); subnet.Contains(a.Next()); a = a.Next() {
		if !taken[a] {
			return a, nil
		}
	}
	return netip.Addr{}, fault.New(fault.Conflict, "no address is free in subnet %s", subnet).
		WithHint("delete VMs that are no longer needed, or configure a larger subnet")
}

// MAC returns the Ethernet address of a VM: locally administered, 02:b6 and the four bytes of the
// id. An id that is not eight hex digits gives "".
func MAC(id vm.ID) string {
	s := string(id)
	if !vmID.MatchString(s) {
		return ""
	}
	return strings.Join([]string{"02:b6", s[0:2], s[2:4], s[4:6], s[6:8]}, ":")
}

// clip keeps a bad name from flooding a message.
func clip(s string) string {
	if len(s) <= 40 {
		return s
	}
	return s[:40] + "... (" + strconv.Itoa(len(s)) + " bytes)"
}
