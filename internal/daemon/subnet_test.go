package daemon

import (
	"net/netip"
	"os/exec"
	"path/filepath"
	"testing"

	"banger/internal/hostnet"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
	"banger/internal/store"
	"banger/internal/vm"
)

// TestSubnetOfVMs: without a bridge, the subnet of the VMs there are is kept.
func TestSubnetOfVMs(t *testing.T) {
	const bridge = "banger987" // no host has it
	s, err := store.Open(t.Context(), filepath.Join(t.TempDir(), "db"))
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	want := func(want netip.Prefix) {
		t.Helper()
		if got, err := subnetOfVMs(t.Context(), s, bridge); err != nil || got != want {
			t.Errorf("got %v, %v, want %v", got, err, want)
		}
	}
	add := func(id vm.ID, name, address string) {
		t.Helper()
		v := vm.VM{ID: id, Spec: vm.Spec{Name: name}, State: vm.Stopped}
		if address != "" {
			v.IP = netip.MustParseAddr(address)
		}
		if _, err := s.Insert(t.Context(), v, func(map[netip.Addr]bool) (netip.Addr, error) { return v.IP, nil }); err != nil {
			t.Fatal(err)
		}
	}
	want(netip.Prefix{})
	add("00000001", "bare", "")
	want(netip.Prefix{})
	fifth := hostnet.Candidates[4]
	add("00000002", "web", "192.168.213.2")
	want(fifth)
	add("00000003", "db", "192.168.213.3")
	want(fifth)
	add("00000004", "old", "172.30.0.2") // they cannot all be served
	want(netip.Prefix{})
}

func TestCurrentSubnetMakesNoBridge(t *testing.T) {
	h := &house{config: settings{bridge: "lo"}} // an interface with an address that is no subnet for VMs
	if got := h.currentSubnet(); got.IsValid() {
		t.Errorf("got %v of lo", got)
	}
	h.config.bridge = "banger987"
	if got := h.currentSubnet(); got.IsValid() {
		t.Errorf("got %v of no bridge", got)
	}
	h.subnet = netip.MustParsePrefix("10.213.0.0/16")
	if got := h.currentSubnet(); got != h.subnet {
		t.Errorf("got %v", got)
	}
}

// TestCurrentSubnetOfABridge: a restarted daemon tells the subnet of the bridge that is there.
func TestCurrentSubnetOfABridge(t *testing.T) {
	need.Binary(t, "ip")
	hosttest.NetNS(t)
	for _, args := range [][]string{{"link", "add", "banger987", "type", "bridge"}, {"addr", "add", "10.213.0.1/16", "dev", "banger987"}} {
		if out, err := exec.Command("ip", args...).CombinedOutput(); err != nil {
			t.Fatalf("ip %q: %v, %s", args, err, out)
		}
	}
	h := &house{config: settings{bridge: "banger987"}}
	if got := h.currentSubnet(); got.String() != "10.213.0.0/16" {
		t.Errorf("got %v", got)
	}
}
