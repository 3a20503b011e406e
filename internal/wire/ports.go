package wire

import (
	"net/netip"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
	"banger/internal/vm"
)

// Ports reads forwards. What is no address or number is a Usage fault; guest port 0 stays.
func Ports(messages []*bangerv1.PortForward) ([]vm.Port, error) {
	all := ports(messages)
	for i, p := range all {
		if !p.Host.IsValid() || p.Host.Port() == 0 {
			m := messages[i]
			return nil, fault.New(fault.Usage, "%.60q port %d is no address of a port", m.GetHostAddress(), m.GetHostPort())
		}
	}
	return all, nil
}

// ports reads forwards; one that makes no sense is a zero vm.Port, which a spec's validation refuses.
func ports(messages []*bangerv1.PortForward) []vm.Port {
	var all []vm.Port
	for _, m := range messages {
		address, err := netip.ParseAddr(or(m.GetHostAddress(), "127.0.0.1"))
		host, guest := m.GetHostPort(), m.GetGuestPort()
		if err != nil || address.Zone() != "" || host < 1 || host > 0xffff || guest < 0 || guest > 0xffff {
			all = append(all, vm.Port{})
			continue
		}
		all = append(all, vm.Port{Host: netip.AddrPortFrom(address.Unmap(), uint16(host)), Guest: uint16(guest)})
	}
	return all
}

// PortForward makes the API's form of a forward.
func PortForward(p vm.Port) *bangerv1.PortForward {
	return &bangerv1.PortForward{HostAddress: p.Host.Addr().String(), HostPort: int32(p.Host.Port()), GuestPort: int32(p.Guest)}
}
