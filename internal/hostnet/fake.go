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
)

// Fake is a network of nothing but memory, for tests and for VMs of the fake driver. It refuses
// what the real one refuses. String prints its world.
type Fake struct {
	mu     sync.Mutex
	bridge netip.Prefix
	taps   map[string]bool
	nat    map[netip.Addr]bool
	fail   func(op string) error
}

var _ Network = (*Fake)(nil)

// NewFake returns a network without a bridge.
func NewFake() *Fake { return &Fake{taps: map[string]bool{}, nat: map[netip.Addr]bool{}} }

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

// AddTAP makes a TAP device.
func (f *Fake) AddTAP(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failure("AddTAP"); err != nil {
		return err
	}
	if err := CheckTAP(name); err != nil {
		return err
	}
	if !f.bridge.IsValid() {
		return fault.New(fault.Conflict, "the bridge does not exist")
	}
	f.taps[name] = true
	return nil
}

// DeleteTAP removes a TAP device.
func (f *Fake) DeleteTAP(_ context.Context, name string) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failure("DeleteTAP"); err != nil {
		return err
	}
	if err := CheckTAP(name); err != nil {
		return err
	}
	delete(f.taps, name)
	return nil
}

// ListTAPs returns the TAP devices, sorted.
func (f *Fake) ListTAPs(context.Context) ([]string, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failure("ListTAPs"); err != nil {
		return nil, err
	}
	return slices.Sorted(maps.Keys(f.taps)), nil
}

// SetNAT switches NAT for a guest.
func (f *Fake) SetNAT(_ context.Context, guest netip.Addr, on bool) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failure("SetNAT"); err != nil {
		return err
	}
	if err := checkGuest(guest); err != nil {
		return err
	}
	if !on {
		delete(f.nat, guest)
		return nil
	}
	if !f.bridge.Masked().Contains(guest) {
		return fault.New(fault.Usage, "guest %s is not in the bridge's subnet", guest)
	}
	f.nat[guest] = true
	return nil
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
	for _, guest := range slices.SortedFunc(maps.Keys(f.nat), netip.Addr.Compare) {
		fmt.Fprintf(&b, "nat %s\n", guest)
	}
	return b.String()
}

func (f *Fake) failure(op string) error {
	if f.fail == nil {
		return nil
	}
	return f.fail(op)
}
