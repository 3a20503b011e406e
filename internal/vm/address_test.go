package vm

import (
	"net/netip"
	"testing"

	"pgregory.net/rapid"
)

func TestIPv6(t *testing.T) {
	if got := IPv6Prefix(netip.MustParsePrefix("172.30.0.1/16")); got != netip.MustParsePrefix("fdb1:a96e:2b47::ac1e:1/112") {
		t.Errorf("prefix %s", got)
	}
	for _, a := range []netip.Addr{{}, netip.MustParseAddr("::1"), netip.MustParseAddr("::ffff:172.30.0.1")} {
		if IPv6(a).IsValid() || IPv6Prefix(netip.PrefixFrom(a, 24)).IsValid() {
			t.Errorf("%s has an IPv6 address", a)
		}
	}
}

// What lies in a subnet or clashes in IPv4 does so in IPv6, and nothing else does.
func TestIPv6SubnetsAreThoseOfIPv4(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		draw := func(name string) netip.Addr {
			return netip.AddrFrom4([4]byte(rapid.SliceOfN(rapid.Byte(), 4, 4).Draw(t, name)))
		}
		a, b := draw("a"), draw("b")
		subnet := netip.PrefixFrom(a, rapid.IntRange(8, 30).Draw(t, "bits")).Masked()
		if got := IPv6Prefix(subnet); got != got.Masked() || got.Contains(IPv6(b)) != subnet.Contains(b) || !IPv6(a).IsPrivate() {
			t.Fatalf("%s is %s, %s is %s", subnet, got, b, IPv6(b))
		}
	})
}
