package e2e

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// identity is what must tell one VM from another.
var identity = map[string]string{
	"host name":       "hostname; hostnamectl hostname",
	"hosts":           "getent hosts $(hostname)",
	"machine id":      "cat /etc/machine-id; journalctl -q -n1 -o json | grep -o '_MACHINE_ID[^,]*'",
	"boot id":         "cat /proc/sys/kernel/random/boot_id",
	"host key":        "cat /etc/ssh/ssh_host_ed25519_key.pub | cut -d' ' -f2",
	"MAC":             "cat /sys/class/net/eth0/address",
	"address":         "ip -4 -o addr show dev eth0 | awk '{print $4}'; hostname -I",
	"random bytes":    "head -c 32 /dev/urandom | sha256sum; cat /proc/sys/kernel/random/uuid",
	"disks":           "for d in /sys/block/vd[bc]; do cat $d/serial; echo; done",
	"temporary names": "mktemp -u XXXXXXXXXXXX",
}

// likeness is what must not: a restored VM is as a booted one.
var likeness = map[string]string{
	"system state":      "systemctl is-system-running --wait",
	"failed units":      "systemctl list-units --failed --no-legend | wc -l",
	"units that run":    "systemctl list-units --state=active --type=service --no-legend | grep -v 'user@\\|ssh@\\|session\\|run-u\\|hostnamed' | awk '{print $1}' | sort",
	"number of links":   "ip -o link | wc -l",
	"number of routes":  "ip route | sed 's/[0-9.]*\\.[0-9]* *$//; s/src.*//' | sort",
	"IPv4 addresses":    "ip -4 -o addr | wc -l",
	"resolv.conf":       "cat /etc/resolv.conf",
	"authorized keys":   "cat /root/.ssh/authorized_keys",
	"mounts":            "awk '{print $2, $3}' /proc/mounts | grep -v '^/proc/sys/kernel/random/boot_id\\|^/run/user\\|^/run/credentials' | sort",
	"what / holds":      "df --output=size / /root | tail -2",
	"kernel parameters": "cat /proc/cmdline",
	"disks":             "for d in /sys/block/vd?; do sed 's/^.*-//' $d/serial; echo; done",
}

// TestTwoClonesOfOneTemplate: VMs made in the same second of one template share no identity, and are as one that booted.
func TestTwoClonesOfOneTemplate(t *testing.T) {
	w := newWorld(t)
	key := w.template()
	names := []string{"left", "right", "cold"}
	var all sync.WaitGroup
	for _, name := range names[:2] {
		all.Go(func() {
			if r := w.try("vm", "create", name); r.code != 0 {
				t.Errorf("create %s: %+v", name, r)
			}
		})
	}
	all.Wait()
	w.banger("vm", "create", "--cold", "cold")
	if t.Failed() {
		return
	}
	w.settled("cold") // the others were when their template was saved
	for name, stage := range map[string]string{"left": "identity", "right": "identity", "cold": "boot"} {
		if !strings.Contains(w.banger("vm", "events", name), stage) {
			t.Errorf("%s has no stage %s", name, stage)
		}
	}
	for what, script := range identity {
		seen := map[string]string{}
		for _, name := range names {
			for line := range strings.Lines(w.guest(name, script)) {
				if other, ok := seen[line]; ok && other != name {
					t.Errorf("%s of %s and %s is %q", what, other, name, line)
				}
				seen[line] = name
			}
		}
	}
	for what, script := range likeness {
		booted := w.guest("cold", script+"; true")
		for _, name := range names[:2] {
			if got := w.guest(name, script+"; true"); got != booted {
				t.Errorf("%s of %s is %q, of a VM that booted %q", what, name, got, booted)
			}
		}
	}
	for _, name := range names {
		if got := w.guest(name, "hostname; cat /etc/hostname; hostnamectl hostname"); got != name+"\n"+name+"\n"+name {
			t.Errorf("%s calls itself %q", name, got)
		}
		clockIsRight(t, w, name)
		if r := w.try("vm", "ssh", name, "--", "hostname"); r.stdout != name+"\n" { // the host key is checked
			t.Errorf("ssh %s: %+v", name, r)
		}
	}
	w.guest("left", "timeout 20 bash -c 'until exec 3<>/dev/tcp/"+w.show("right").IP+"/22; do sleep 0.2; done'")
	t.Run("delete it under them", func(t *testing.T) { templateIsDeletedUnderClones(t, w, key) })
}

// settled waits until the guest's systemd has started all it wants to, and says what has failed.
func (w *world) settled(name string) {
	w.t.Helper()
	script := `state=$(systemctl is-system-running --wait); [ "$state" = running ] || { echo $state; systemctl --failed --no-legend --plain; journalctl -q -p warning -n 40; }`
	if out := w.guest(name, script); out != "" {
		w.t.Errorf("%s: systemd is %s", name, out)
	}
}

// clockIsRight to 100 ms, besides the time that the question takes.
func clockIsRight(t *testing.T, w *world, name string) {
	t.Helper()
	const exact = 100 * time.Millisecond
	before := time.Now()
	text := w.guest(name, "date +%s%N")
	after := time.Now()
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		t.Fatal(err)
	}
	if at := time.Unix(0, n); at.Before(before.Add(-exact)) || at.After(after.Add(exact)) {
		t.Errorf("%s says it is %s, between %s and %s", name, at, before, after)
	}
}

func templateIsDeletedUnderClones(t *testing.T, w *world, key string) {
	w.banger("template", "delete", key[:6])
	if out := w.banger("template", "list", "-o", "json"); strings.Contains(out, key) {
		t.Errorf("still there: %s", out)
	}
	// What was mapped and not yet touched is there all the same.
	w.guest("left", "find / -xdev -type f -size -64k | head -2000 | xargs cat >/dev/null 2>&1; systemctl is-system-running")
	w.banger("vm", "stop", "left")
	w.banger("vm", "start", "left") // boots from the disks it was cloned with
	if got := w.guest("left", "hostname; cat /etc/machine-id"); !strings.HasPrefix(got, "left\n") {
		t.Errorf("after stop and start: %q", got)
	}
	w.banger("vm", "create", "after")
	if events := w.banger("vm", "events", "after"); !strings.Contains(events, "boot") || strings.Contains(events, "identity") {
		t.Errorf("created without a template:\n%s", events)
	}
}

// template warms the default template and returns its key.
func (w *world) template() string {
	w.t.Helper()
	var made struct{ Key string }
	if err := json.Unmarshal([]byte(w.banger("template", "warm", "-o", "json")), &made); err != nil {
		w.t.Fatal(err)
	}
	return made.Key
}

// TestLargerDisks: a clone's file systems are as large as wished.
func TestLargerDisks(t *testing.T) {
	w := newWorld(t)
	w.template()
	w.banger("vm", "create", "large", "--disk", "6G", "--work-disk", "7G")
	if !strings.Contains(w.banger("vm", "events", "large"), "identity") {
		t.Error("it was not restored")
	}
	sizes := strings.Fields(w.guest("large", "df --output=size -BM / /root | tail -2 | tr -d M"))
	for i, least := range []int{5600, 6600} {
		if got, err := strconv.Atoi(sizes[i]); err != nil || got < least {
			t.Errorf("sizes %v MB, want at least %d", sizes, least)
		}
	}
	w.guest("large", "dd if=/dev/zero of=/root/blob bs=1M count=64 conv=fsync status=none")
}

// TestDaemonDiesWhileATemplateIsMade: the next daemon ends the machine and removes all of it.
func TestDaemonDiesWhileATemplateIsMade(t *testing.T) {
	w := newColdWorld(t)
	cmd := w.command(t.Context(), "template", "warm", "--memory", "256M")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	awaitProcess(t, w)
	w.killDaemon()
	_ = cmd.Wait()
	nothingLeft(t, w) // the list starts a daemon
	if left, _ := filepath.Glob(filepath.Join(w.dir, "cache/banger/templates/.new-*")); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	if out := w.banger("template", "list", "-o", "json"); out != "[]" {
		t.Errorf("templates: %s", out)
	}
}

// flip changes one bit of what a file holds and sets its time back: only its content tells.
func flip(t *testing.T, path string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	before, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	at, err := f.Seek(0, unix.SEEK_DATA)
	if err != nil {
		t.Fatal(err)
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1
	if _, err := f.WriteAt(b, at); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, before.ModTime(), before.ModTime()); err != nil {
		t.Fatal(err)
	}
}

// TestADamagedTemplateIsNotUsed: the VM boots, the user is told, and the template is gone.
func TestADamagedTemplateIsNotUsed(t *testing.T) {
	w := newColdWorld(t)
	var made struct{ Key, Directory string }
	if err := json.Unmarshal([]byte(w.banger("template", "warm", "--memory", "256M", "-o", "json")), &made); err != nil {
		t.Fatal(err)
	}
	flip(t, filepath.Join(made.Directory, "memory"))
	r := w.try("vm", "create", "web", "--memory", "256M")
	if r.code != 0 || !strings.Contains(r.stderr, made.Key) {
		t.Errorf("create: %+v", r)
	}
	if got := w.guest("web", "hostname"); got != "web" {
		t.Errorf("it calls itself %q", got)
	}
	if _, err := os.Stat(made.Directory); err == nil {
		t.Error("the damaged template is still there")
	}
	if left := w.processes(); len(left) < 1 || syscall.Kill(w.show("web").PID, 0) != nil {
		t.Errorf("processes: %v", left)
	}
}
