package kvm

import (
	"os"
	"testing"
	"time"
)

func TestVerdict(t *testing.T) {
	if r := verdict(40_000, 100*time.Millisecond); r.Usable || r.Reason == "" {
		t.Errorf("0.4 million a second: %+v", r)
	}
	if r := verdict(100_000_000, 25*time.Millisecond); !r.Usable || r.Reason != "" {
		t.Errorf("4000 million a second: %+v", r)
	}
}

// TestProbe: whatever this machine is, the probe comes to a verdict soon and says why.
func TestProbe(t *testing.T) {
	begin := time.Now()
	r := Probe()
	t.Logf("%+v after %s", r, time.Since(begin))
	if took := time.Since(begin); took > 2*time.Second {
		t.Errorf("took %s", took)
	}
	if r.Usable != (r.Reason == "") {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat("/sys/module/kvm_pvm"); err == nil && r.Usable {
		t.Error("a paravirtual KVM counts as usable")
	}
}
