package dns

import (
	"net/netip"
	"testing"
)

// TestOneGuestLeavesRoom for the questions of others, and gives back what it took.
func TestOneGuestLeavesRoom(t *testing.T) {
	s := slots{each: map[netip.Addr]int{}}
	address := netip.MustParseAddr("172.30.0.2")
	took := func(a netip.Addr) (n int) {
		for s.take(a) {
			n++
		}
		return n
	}
	greedy := address
	if n := took(greedy); n != maxForwardsEach {
		t.Errorf("one guest has %d questions under way, want %d", n, maxForwardsEach)
	}
	all := maxForwardsEach
	for address = address.Next(); ; address = address.Next() {
		n := took(address)
		if all += n; n == 0 {
			break
		}
	}
	if all != maxForwards {
		t.Errorf("%d questions under way, want %d", all, maxForwards)
	}
	for range maxForwardsEach {
		s.give(greedy)
	}
	if s.take(address); s.all != maxForwards-maxForwardsEach+1 || s.each[greedy] != 0 || len(s.each) != maxForwards/maxForwardsEach {
		t.Errorf("left: %d of %v", s.all, s.each)
	}
}
