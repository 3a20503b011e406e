package engine

import (
	"errors"
	"strings"
	"testing"

	"banger/internal/fault"
	"banger/internal/vm"
)

// A change holds at once for a VM that runs, and from its next start for one that does not.
func TestSet(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	nat := func(on bool) func(*vm.Spec) { return func(s *vm.Spec) { s.NAT = on } }
	h.create("web")
	for range 2 {
		v, err := h.Set(ctx, "web", nat(false))
		if err != nil || v.Spec.NAT || strings.Contains(h.net.String(), "nat") {
			t.Fatalf("%+v, %v, network:\n%s", v.Spec, err, h.net)
		}
	}
	if _, err := h.Set(ctx, "web", func(s *vm.Spec) { s.NAT, s.Isolated = true, true }); err != nil {
		t.Fatal(err)
	}
	if s := h.net.String(); !strings.Contains(s, "nat ") || !strings.Contains(s, "isolated ") {
		t.Errorf("network:\n%s", s)
	}
	if _, err := h.Stop(ctx, "web", true, nil); err != nil {
		t.Fatal(err)
	}
	if v, err := h.Set(ctx, "web", nat(false)); err != nil || v.Spec.NAT || strings.Contains(h.net.String(), "tap") {
		t.Errorf("%+v, %v, network:\n%s", v.Spec, err, h.net)
	}
	if v, err := h.Start(ctx, "web", nil); err != nil || v.Spec.NAT || !v.Spec.Isolated || strings.Contains(h.net.String(), "nat") {
		t.Errorf("%+v, %v, network:\n%s", v.Spec, err, h.net)
	}
	if _, err := h.Set(ctx, "gone", nat(true)); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a VM that is not there: %v", err)
	}
	if _, err := h.Set(ctx, "web", func(s *vm.Spec) { s.CPUs = -1 }); fault.KindOf(err) != fault.Usage {
		t.Errorf("a spec that makes no sense: %v", err)
	}
	if v, err := h.Get(ctx, "web"); err != nil || v.Spec.CPUs < 1 {
		t.Errorf("it was kept: %+v, %v", v.Spec, err)
	}
}

// What the host refuses changes nothing.
func TestSetFails(t *testing.T) {
	h := newHouse(t)
	ctx := t.Context()
	h.create("web")
	before := h.net.String()
	calls := 0
	h.net.FailWith(func(op string) error {
		if op == "Attach" {
			if calls++; calls == 1 {
				return errors.New("no")
			}
		}
		return nil
	})
	if _, err := h.Set(ctx, "web", func(s *vm.Spec) { s.NAT = false }); err == nil {
		t.Fatal("no error")
	}
	h.net.FailWith(nil)
	if v, err := h.Get(ctx, "web"); err != nil || !v.Spec.NAT || h.net.String() != before {
		t.Errorf("%+v, %v, network:\n%s", v.Spec, err, h.net)
	}
}
