package hostnet

import (
	"net/netip"
	"regexp"

	"banger/internal/fault"
)

// Limits of one bridge's rules.
const (
	// MaxGuests is how many TAP devices a bridge can have: BR_MAX_PORTS of the kernel's net/bridge.
	MaxGuests = 1023
)

// guestMAC is what MAC returns.
var guestMAC = regexp.MustCompile(`^02:b6(:[0-9a-f]{2}){4}$`)

// Guest is what the host's rules know of a VM that runs.
type Guest struct {
	TAP      string     `json:"tap"`
	MAC      string     `json:"mac,omitempty"`
	IP       netip.Addr `json:"ip,omitzero"` // zero: it has none and reaches nothing
	NAT      bool       `json:"nat,omitempty"`
	Isolated bool       `json:"isolated,omitempty"`
}

// Policy is what holds for all guests of a bridge.
type Policy struct {
	// HostServices: guests reach what listens on the host, beside banger's DNS and the answers to pings.
	HostServices bool `json:"host_services,omitempty"`
	// LinkLocal: guests with NAT reach 169.254.0.0/16, where clouds hand out a machine's credentials.
	LinkLocal bool `json:"link_local,omitempty"`
}

// Rules is the whole of what a bridge wants of the host's packet filter.
type Rules struct {
	Policy
	Guests []Guest `json:"guests,omitempty"`
}

// AnyNAT tells whether a guest reaches other networks.
func (r Rules) AnyNAT() bool {
	for _, g := range r.Guests {
		if g.NAT && g.IP.IsValid() {
			return true
		}
	}
	return false
}

// Check refuses rules that make no sense, whatever the bridge.
func (r Rules) Check() error {
	if len(r.Guests) > MaxGuests {
		return fault.New(fault.Conflict, "%d guests are more than a bridge takes, %d", len(r.Guests), MaxGuests).
			WithHint("stop some VMs")
	}
	taps, addresses := map[string]bool{}, map[netip.Addr]bool{}
	for _, g := range r.Guests {
		if err := g.check(); err != nil {
			return err
		}
		if taps[g.TAP] || g.IP.IsValid() && addresses[g.IP] {
			return fault.New(fault.Usage, "two guests have TAP device %s or address %s", g.TAP, g.IP)
		}
		taps[g.TAP], addresses[g.IP] = true, true
	}
	return nil
}

func (g Guest) check() error {
	if err := CheckTAP(g.TAP); err != nil {
		return err
	}
	if !g.IP.IsValid() && g.MAC == "" && !g.NAT {
		return nil
	}
	if !guestMAC.MatchString(g.MAC) {
		return fault.New(fault.Usage, "%q is no Ethernet address of a guest", clip(g.MAC))
	}
	if g.IP.IsValid() || g.NAT {
		return checkGuest(g.IP)
	}
	return nil
}
