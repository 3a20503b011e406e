package e2e

import (
	"encoding/json"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"banger/internal/hosttest/need"
)

// TestSnapshot takes a VM with a counter at work back to a snapshot: memory and files of one moment.
func TestSnapshot(t *testing.T) {
	w := newWorld(t)
	w.banger("vm", "create", "web", "--memory", "512M")
	w.tick("web", "/run/count")
	w.guest("web", "echo before >/root/word; echo deep >/etc/word")
	boot := w.guest("web", "cat /proc/sys/kernel/random/boot_id")
	begin := time.Now()
	var made struct {
		Kind          string
		PauseSeconds  float64 `json:"pause_seconds"`
		ApparentBytes int64   `json:"apparent_bytes"`
		RealBytes     int64   `json:"real_bytes"`
	}
	out := w.banger("vm", "snapshot", "create", "web", "v1", "-o", "json")
	if err := json.Unmarshal([]byte(out), &made); err != nil || made.Kind != "memory" {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("made in %v, the guest stood still for %.3f s, %d MB on disk", time.Since(begin), made.PauseSeconds, made.RealBytes>>20)
	clockIsRight(t, w, "web")
	disks, err := filepath.Glob(filepath.Join(w.dir, "state/banger/vms/*/snapshots/v1/*.ext4"))
	if err != nil || len(disks) != 2 {
		t.Errorf("the snapshot's disks are %v, %v", disks, err)
	}
	for _, path := range disks { // their file systems stood still: they are whole without their journals
		out, err := exec.Command(need.Binary(t, "dumpe2fs"), "-h", path).Output()
		if err != nil || strings.Contains(string(out), "needs_recovery") {
			t.Errorf("%s: %v\n%s", path, err, out)
		}
	}
	w.guest("web", "echo after >/root/word; echo after >/etc/word; sync; sleep 10")
	late := counted(t, w)
	if r := w.try("vm", "snapshot", "restore", "web", "v1"); r.code != 4 {
		t.Errorf("a VM that runs: %+v", r)
	}
	begin = time.Now()
	w.banger("vm", "snapshot", "restore", "web", "v1", "--yes")
	t.Logf("restored in %v", time.Since(begin))
	if n := counted(t, w); n >= late {
		t.Errorf("the counter is at %d, was at %d", n, late)
	}
	if got := w.guest("web", "cat /root/word /etc/word /proc/sys/kernel/random/boot_id"); got != "before\ndeep\n"+boot {
		t.Errorf("the guest has %q", got)
	}
	clockIsRight(t, w, "web")
	w.ticks("web", "/run/count")
	w.banger("vm", "snapshot", "restore", "web", "v1", "--yes", "--disks-only")
	w.await("web", "stopped", 0)
	w.banger("vm", "start", "web")
	if got := w.guest("web", "cat /root/word /etc/word"); got != "before\ndeep" {
		t.Errorf("booted from the snapshot's disks, the guest has %q", got)
	}
	w.banger("vm", "delete", "web", "--force")
}

func counted(t *testing.T, w *world) int {
	t.Helper()
	n, err := strconv.Atoi(w.guest("web", "cat /run/count"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}
