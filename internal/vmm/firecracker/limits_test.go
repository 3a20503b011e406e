package firecracker_test

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"testing"
	"time"

	"banger/internal/hosttest"
	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/firecracker"
	"banger/internal/vmm/firecracker/fctest"
)

// TestLimits: a machine has the limits of its disks and network and its balloon, and one that goes on from what was
// saved has its own limits: others, none, or the first ones.
func TestLimits(t *testing.T) {
	onBoth(t, func(t *testing.T, b bench) {
		hosttest.NetNS(t)
		hosttest.TAP(t, "tap-x")
		ctx, d := context.Background(), b.driver(t)
		caps, err := d.Caps(ctx)
		if err != nil {
			t.Fatal(err)
		}
		m := b.machine(t, fctest.Count)
		m.Disks = []vmm.Disk{{Role: "root", Path: disk(t, "root"), ReadOnly: true}, {Role: "work", Path: disk(t, "work")}}
		m.NICs = []vmm.NIC{{TAP: "tap-x", MAC: "52:54:00:00:00:01"}}
		m.DiskRate, m.NetRate, m.Balloon = 100<<20, 50<<20, caps.Balloon
		r := boot(t, d, m)
		console(t, m, b.said())
		keeps(t, m)
		if err := r.(vmm.Pauser).Pause(ctx); err != nil {
			t.Fatal(err)
		}
		dir := t.TempDir()
		if err := r.(vmm.Saver).Save(ctx, dir); err != nil {
			t.Fatal(err)
		}
		if err := r.Stop(ctx); err != nil {
			t.Fatal(err)
		}
		for _, rates := range [][2]int64{{m.DiskRate, m.NetRate}, {1 << 20, 2 << 20}, {0, 0}} {
			clone := b.machine(t, fctest.Halt)
			clone.Disks, clone.NICs, clone.Balloon = m.Disks, m.NICs, m.Balloon
			clone.DiskRate, clone.NetRate = rates[0], rates[1]
			r, err := d.(vmm.Restorer).Restore(within(t, 20*time.Second), clone, dir)
			if err != nil {
				t.Fatalf("restore: %v", err)
			}
			keeps(t, clone)
			if err := r.Stop(ctx); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(m.Disks[1].Path, 2<<20); err != nil { // the next one is told of both at once
				t.Fatal(err)
			}
		}
	})
}

// keeps compares what Firecracker says that the machine is with m.
func keeps(t *testing.T, m vmm.Machine) {
	t.Helper()
	type limiter struct {
		Bandwidth struct {
			Size   int64 `json:"size"`
			Refill int64 `json:"refill_time"`
		} `json:"bandwidth"`
	}
	var is struct {
		Drives []struct {
			Limiter *limiter `json:"rate_limiter"`
		} `json:"drives"`
		Networks []struct {
			RX *limiter `json:"rx_rate_limiter"`
			TX *limiter `json:"tx_rate_limiter"`
		} `json:"network-interfaces"`
		Balloon *struct {
			Reporting bool `json:"free_page_reporting"`
			Deflate   bool `json:"deflate_on_oom"`
		} `json:"balloon"`
	}
	transport := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return system.DialUnixIn(ctx, m.Dir, firecracker.APISocket)
	}}
	answer, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Get("http://firecracker/vm/config")
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	if err := json.NewDecoder(answer.Body).Decode(&is); err != nil {
		t.Fatal(err)
	}
	same := func(what string, l *limiter, rate int64) {
		t.Helper()
		if (l != nil) != (rate != 0) || l != nil && (l.Bandwidth.Size != rate || l.Bandwidth.Refill != 1000) {
			t.Errorf("%s has the limit %+v, not %d", what, l, rate)
		}
	}
	if len(is.Drives) != len(m.Disks) || len(is.Networks) != len(m.NICs) {
		t.Fatalf("%+v", is)
	}
	for _, d := range is.Drives {
		same("a drive", d.Limiter, m.DiskRate)
	}
	for _, n := range is.Networks {
		same("what the guest receives", n.RX, m.NetRate)
		same("what the guest sends", n.TX, m.NetRate)
	}
	if has := is.Balloon != nil && is.Balloon.Reporting && is.Balloon.Deflate; has != m.Balloon {
		t.Errorf("the balloon is %+v", is.Balloon)
	}
}
