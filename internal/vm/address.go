package vm

import "net/netip"

// ula is the first 96 bits of VMs' IPv6 addresses: a unique local prefix with the global id b1a96e2b47
// (RFC 4193, chosen at random), which leads nowhere but over banger's bridges.
var ula = netip.MustParseAddr("fdb1:a96e:2b47::").As16()

// ULABits is the length of the prefix that all IPv6 addresses of VMs have in common.
const ULABits = 96

// IPv6 returns the IPv6 address that goes with an IPv4 address: the unique local prefix and the IPv4
// address in the last 32 bits. So VMs have one address to keep, and bridges whose IPv4 subnets differ
// have different IPv6 subnets. An address that is not IPv4 gives the zero Addr.
func IPv6(a netip.Addr) netip.Addr {
	if !a.Is4() {
		return netip.Addr{}
	}
	six, four := ula, a.As4()
	copy(six[ULABits/8:], four[:])
	return netip.AddrFrom16(six)
}

// IPv6Prefix is IPv6 of an address with the length of its subnet; the zero Prefix of what is not IPv4.
func IPv6Prefix(p netip.Prefix) netip.Prefix {
	if !p.Addr().Is4() {
		return netip.Prefix{}
	}
	return netip.PrefixFrom(IPv6(p.Addr()), ULABits+p.Bits())
}

// IPv6 returns the VM's IPv6 address; the zero Addr when it has no IPv4 one.
func (v VM) IPv6() netip.Addr { return IPv6(v.IP) }
