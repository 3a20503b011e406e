package hostnet

import (
	"context"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"
	"sync"

	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/vm"
)

// Fake is a network of nothing but memory, for tests and for VMs of the fake driver. It refuses
// what the real one refuses. String prints its world.
type Fake struct {
	mu     sync.Mutex
	bridge netip.Prefix
	guests map[vm.ID]Guest
	taps   map[string]bool
	fail   func(op string) error
}

var _ Network = (*Fake)(nil)

// NewFake returns a network without a bridge.
func NewFake() *Fake { return &Fake{guests: map[vm.ID]Guest{}, taps: map[string]bool{}} }

// FailWith makes every later call ask f, by the method's name, whether to fail; nil ends that.
func (f *Fake) FailWith(fail func(op string) error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = fail
}

// Check finds nothing missing.
func (f *Fake) Check(context.Context) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.failure("Check")
}

// EnsureBridge makes the bridge on banger's default subnet.
func (f *Fake) EnsureBridge(context.Context) (netip.Prefix, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failure("EnsureBridge"); err != nil {
		return netip.Prefix{}, err
	}
	f.bridge = Gateway(Candidates[0])
	return f.bridge, nil
}

// Attach gives a VM a device and its rules.
func (f *Fake) Attach(_ context.Context, id vm.ID, g Guest) (string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failure("Attach"); err != nil {
		return "", err
	}
	if !f.bridge.IsValid() {
		return "", fault.New(fault.Conflict, "the bridge does not exist")
	}
	if had, ok := f.guests[id]; ok {
		g.TAP = had.TAP
	}
	for n := 0; g.TAP == ""; n++ {
		if name := fmt.Sprintf("%s%d", paths.PoolPrefix, n); !f.taps[name] {
			g.TAP = name
		}
	}
	if err := g.check(); err != nil {
		return "", err
	}
	if g.IP.IsValid() && !f.bridge.Masked().Contains(g.IP) {
		return "", fault.New(fault.Usage, "guest %s is not in the bridge's subnet", g.IP)
	}
	f.taps[g.TAP], f.guests[id] = true, g
	return g.TAP, nil
}

// Detach takes a VM's device and rules back.
func (f *Fake) Detach(_ context.Context, id vm.ID) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failure("Detach"); err != nil {
		return err
	}
	if g, ok := f.guests[id]; ok {
		delete(f.taps, g.TAP)
		delete(f.guests, id)
	}
	return nil
}

// Settle removes the devices that belong to nobody.
func (f *Fake) Settle(_ context.Context, attached map[vm.ID]Guest) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failure("Settle"); err != nil {
		return nil, err
	}
	f.guests = map[vm.ID]Guest{} // an earlier daemon's are those that were handed to us
	maps.Copy(f.guests, attached)
	used := map[string]bool{}
	for _, g := range f.guests {
		used[g.TAP], f.taps[g.TAP] = true, true
	}
	var removed []string
	for _, tap := range slices.Sorted(maps.Keys(f.taps)) {
		if !used[tap] {
			delete(f.taps, tap)
			removed = append(removed, tap)
		}
	}
	return removed, nil
}

// TAPs returns the devices that there are, sorted.
func (f *Fake) TAPs() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Sorted(maps.Keys(f.taps))
}

// Leave puts a device there that belongs to nobody, as a daemon that died does.
func (f *Fake) Leave(tap string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.taps[tap] = true
}

// String prints the world, one thing a line, sorted; "" when there is nothing.
func (f *Fake) String() string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var b strings.Builder
	if f.bridge.IsValid() {
		fmt.Fprintf(&b, "bridge %s\n", f.bridge)
	}
	for _, tap := range slices.Sorted(maps.Keys(f.taps)) {
		fmt.Fprintf(&b, "tap %s\n", tap)
	}
	for _, g := range slices.SortedFunc(maps.Values(f.guests), func(a, b Guest) int { return a.IP.Compare(b.IP) }) {
		if g.NAT {
			fmt.Fprintf(&b, "nat %s\n", g.IP)
		}
		if g.Isolated {
			fmt.Fprintf(&b, "isolated %s\n", g.IP)
		}
	}
	return b.String()
}

func (f *Fake) failure(op string) error {
	if f.fail == nil {
		return nil
	}
	return f.fail(op)
}
