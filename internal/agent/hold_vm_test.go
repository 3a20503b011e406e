package agent

import (
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/disk"
	"banger/internal/hosttest/need"
	"banger/internal/system"
	"banger/internal/vmm"
)

// diary is a program that writes down who it is and when, and reads nothing.
const diary = `while :; do read u x < /proc/uptime; read n < /proc/sys/kernel/hostname; echo "$n $u"; sleep 0.1; done >/run/diary 2>&1 </dev/null &`

// entries are the last moment, in seconds of uptime, when the diary's writer had a name, and the first after it with
// another one; 0: there is none.
func (m *machine) entries(ctx context.Context, name string) (last, next float64) {
	m.t.Helper()
	for line := range strings.Lines(m.shell(ctx, "cat /run/diary")) {
		who, when, _ := strings.Cut(strings.TrimSpace(line), " ")
		at, err := strconv.ParseFloat(when, 64)
		switch {
		case err != nil: // cut off
		case who == name:
			last, next = at, 0
		case next == 0:
			next = at
		}
	}
	return last, next
}

// quiesced lets everything in the guest stand still.
func (m *machine) quiesced(ctx context.Context) {
	m.t.Helper()
	begin := time.Now()
	r, err := m.client.Quiesce(ctx, &agentv1.QuiesceRequest{Hold: true})
	check(m.t, err)
	if len(r.GetLacking()) > 0 {
		m.t.Errorf("could not be had: %q", r.GetLacking())
	}
	m.t.Logf("quiesced in %s, programs stood still for %s of that", time.Since(begin), time.Duration(r.GetHeldNanos()))
}

// released lets it run on as who it was.
func (m *machine) released(ctx context.Context) {
	m.t.Helper()
	_, err := m.client.Adopt(ctx, &agentv1.AdoptRequest{Entropy: make([]byte, 32)})
	check(m.t, err)
}

// execLater starts a program; its output is sent when it has ended.
func (m *machine) execLater(ctx context.Context, script string) <-chan string {
	ended := make(chan string, 1)
	go func() {
		out, exit, err := m.exec(ctx, &agentv1.ExecStart{Argv: []string{"sh", "-c", script}})
		if err != nil || exit.GetCode() != 0 {
			out = "failed: " + out
		}
		ended <- out
	}()
	return ended
}

// needsNoJournal checks that a disk which was copied is whole as it is.
func needsNoJournal(t *testing.T, path string) {
	t.Helper()
	out, err := system.Run(t.Context(), system.Command{Path: need.Binary(t, "dumpe2fs"), Args: []string{"-h", path}})
	check(t, err)
	if text := string(out); strings.Contains(text, "needs_recovery") || !strings.Contains(text, "has_journal") {
		t.Errorf("%s:\n%s", path, text)
	}
	if out, err := system.Run(t.Context(), system.Command{Path: need.Binary(t, "e2fsck"), Args: []string{"-fn", path}}); err != nil {
		t.Errorf("%s: %v\n%s", path, err, out)
	}
}

// A guest of one CPU is held: who wants to start a program waits, its disks are whole without their journals, and it goes on.
// What was saved of it meanwhile goes on as somebody else, and not before it is told, however long that takes. An agent that
// dies while it holds a guest leaves one that goes on.
func TestRealGuestIsHeld(t *testing.T) {
	m := newMachine(t)
	m.m.CPUs = 1
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	m.boot(ctx)
	m.ping(ctx)
	m.settled(ctx)
	m.shell(ctx, diary)
	m.shell(ctx, "dd if=/dev/zero of=/root/zeros bs=1M count=8 2>&1; cp /root/zeros /var/zeros; echo first >/root/kept")

	m.quiesced(ctx)
	waits := m.execLater(ctx, "echo second >>/root/kept; cat /root/kept")
	for range 5 {
		m.ping(ctx)
	}
	select {
	case out := <-waits:
		t.Fatalf("a program was started in a guest that stands still: %q", out)
	default:
	}
	check(t, m.running.(vmm.Pauser).Pause(ctx))
	saved := t.TempDir()
	check(t, m.running.(vmm.Saver).Save(ctx, saved))
	child := *m
	child.m.Dir, child.m.ID = t.TempDir(), "89abcdef"
	for _, name := range []string{"overlay", "work"} {
		copied := filepath.Join(child.m.Dir, name)
		check(t, disk.CloneFile(ctx, copied, filepath.Join(m.m.Dir, name)))
		needsNoJournal(t, copied)
	}
	check(t, m.running.(vmm.Pauser).Resume(ctx))
	m.released(ctx)
	if out := <-waits; out != "first\nsecond\n" {
		t.Errorf("who waited had %q", out)
	}
	m.agentDiesWhileItHolds(ctx)
	m.shutdown(ctx, agentv1.ShutdownRequest_MODE_POWEROFF, vmm.ExitPowerOff)

	child.restore(ctx, saved)
	const late = 12 * time.Second // longer than a guest waits that is who it was
	time.Sleep(late)
	child.ping(ctx)
	child.setClock(ctx)
	r, err := child.client.Adopt(ctx, &agentv1.AdoptRequest{
		Entropy: make([]byte, 32), GrowDisks: true, Identity: &agentv1.GuestConfig{Hostname: "child", MachineId: strings.Repeat("0b", 16)},
	})
	check(t, err)
	if r.GetLate() {
		t.Error("programs ran on before the child knew who it is")
	}
	if got := child.shell(ctx, "until grep -q ^child /run/diary; do sleep 0.1; done; hostname; cat /root/kept /etc/hostname"); got != "child\nfirst\nchild\n" {
		t.Errorf("the child has %q", got)
	}
	if last, next := child.entries(ctx, "web"); next-last < 5 { // of the guest's time
		t.Errorf("its program was the source's until %.1f, and the child's from %.1f on", last, next)
	}
	child.shutdown(ctx, agentv1.ShutdownRequest_MODE_POWEROFF, vmm.ExitPowerOff)
}

// agentDiesWhileItHolds has the agent killed by a program that does not stand still, because it went where the agent is.
func (m *machine) agentDiesWhileItHolds(ctx context.Context) {
	m.t.Helper()
	kill, err := m.client.Exec(ctx)
	check(m.t, err)
	check(m.t, kill.Send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{Stdin: true, Argv: []string{
		"sh", "-c", "echo $$ > /sys/fs/cgroup/system.slice/banger-agent.service/cgroup.procs; echo there; read go; kill -9 $(cat /run/banger/agent.pid)",
	}}}}))
	for there := false; !there; {
		r, err := kill.Receive()
		check(m.t, err)
		there = string(r.GetStdout()) == "there\n"
	}
	m.quiesced(ctx)
	waits := m.execLater(ctx, "true")
	for range 5 {
		m.ping(ctx)
	}
	check(m.t, kill.Send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Stdin{Stdin: []byte("go\n")}}))
	if out := <-waits; !strings.HasPrefix(out, "failed") { // it waited, and went with the agent
		m.t.Errorf("it did not die: %q", out)
	}
	_, _ = kill.Receive() // which ends with the agent
	begin := time.Now()
	m.ping(ctx)
	if got := m.shell(ctx, "test -e /run/banger/held && echo held; echo third >/root/third; cat /root/third"); got != "third\n" {
		m.t.Errorf("after the agent died: %q", got)
	}
	m.t.Logf("the guest went on %s after its agent's death", time.Since(begin))
	m.isLookedAfter(ctx)
}

// isLookedAfter checks that systemd knows the agent that runs as its own child, the only one, and that nobody guards it.
func (m *machine) isLookedAfter(ctx context.Context) {
	m.t.Helper()
	const want = "1 agents of systemd's, 0 guards\n"
	got := m.shell(ctx, `until systemctl is-active -q banger-agent && test "$(systemctl show -P MainPID banger-agent)" = "$(cat /run/banger/agent.pid)"; do sleep 0.2; done
		until test "$(pgrep -cf '[b]anger/agent guard')" = 0; do sleep 0.2; done
		echo "$(pgrep -cf -P 1 '[b]anger/agent serve') agents of systemd's, $(pgrep -cf '[b]anger/agent guard') guards"`)
	if got != want {
		m.t.Errorf("%q, want %q", got, want)
	}
}

// lost waits until the agent that is there has died, and for the next one.
func (m *machine) lost(ctx context.Context) {
	m.t.Helper()
	for begin := time.Now(); time.Since(begin) < time.Minute; time.Sleep(20 * time.Millisecond) {
		once, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := m.client.Ping(once, &agentv1.PingRequest{})
		cancel()
		if err != nil {
			m.t.Logf("it died %.1f s later: %v", time.Since(begin).Seconds(), err)
			m.ping(ctx)
			return
		}
	}
	m.t.Fatal("the agent did not die")
}

// A template's clone whose agent dies stands still until somebody says who it is, and not after that: also when its programs
// rest, systemd among them.
func TestRealGuestOutlivesItsAgent(t *testing.T) {
	m := newMachine(t)
	ctx, cancel := context.WithTimeout(t.Context(), 8*time.Minute)
	defer cancel()
	template := filepath.Join(m.m.Dir, "template")
	check(t, os.Mkdir(template, 0o700))
	m.m.MemoryFile = filepath.Join(template, vmm.SavedMemory)
	m.boot(ctx)
	m.ping(ctx)
	m.settled(ctx)
	m.shell(ctx, diary)
	const before, atRest = "test $(date +%Y) -ge 2040", "grep -qsx told /run/banger/held && sleep 2"
	for _, when := range []string{before, atRest} { // killed by programs that do not stand still
		m.shell(ctx, `set -e; echo $$ > /sys/fs/cgroup/system.slice/banger-agent.service/cgroup.procs
			(until `+when+`; do sleep 0.1; done; kill -9 $(cat /run/banger/agent.pid)) >/dev/null 2>&1 </dev/null &`)
	}
	m.saved(ctx, template, true)

	for _, name := range []string{"early", "resting"} {
		c := *m
		c.m.Dir, c.m.MemoryFile = t.TempDir(), ""
		for _, disks := range []string{"overlay", "work"} {
			check(t, disk.CloneFile(ctx, filepath.Join(c.m.Dir, disks), filepath.Join(m.m.Dir, disks)))
		}
		c.restore(ctx, template)
		c.ping(ctx)
		if name == "early" {
			_, err := c.client.SetTime(ctx, &agentv1.SetTimeRequest{UnixNanos: time.Date(2041, 1, 1, 0, 0, 0, 0, time.UTC).UnixNano()})
			check(t, err)
			c.lost(ctx)
		}
		c.setClock(ctx)
		request := &agentv1.AdoptRequest{
			Entropy: make([]byte, 32), RestMillis: int32(5 * time.Minute / time.Millisecond),
			Identity: &agentv1.GuestConfig{Hostname: name, MachineId: strings.Repeat("0c", 16)},
		}
		for range 2 { // the first answer may have been lost
			_, err := c.client.Adopt(ctx, request)
			check(t, err)
		}
		c.lost(ctx)
		if got := c.shell(ctx, "until grep -q ^"+name+" /run/diary; do sleep 0.1; done; grep -vc '^web\\|^"+name+"' /run/diary; hostname; test -e /run/banger/held && echo held || true"); got != "0\n"+name+"\n" {
			t.Errorf("the clone says %q", got)
		}
		c.isLookedAfter(ctx)
		c.shutdown(ctx, agentv1.ShutdownRequest_MODE_POWEROFF, vmm.ExitPowerOff)
	}
}

// A guest whose init knows nothing of control groups stands still all the same, its init too, and finds no trace of it.
func TestRealGuestWithoutControlGroupsIsHeld(t *testing.T) {
	m := newMachine(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	m.boot(ctx)
	m.ping(ctx)
	m.shell(ctx, `cat >/opt/init <<-'END'
		#!/bin/sh
		`+diary+`
		while :; do sleep 1; date >/run/of-init; done
	END
	chmod +x /opt/init`)
	m.shutdown(ctx, agentv1.ShutdownRequest_MODE_REBOOT, vmm.ExitReboot)

	m.m.Cmdline = append(m.m.Cmdline, "init=/opt/init")
	m.boot(ctx)
	m.ping(ctx)
	mounts := m.shell(ctx, "cat /proc/mounts; test -s /run/diary || sleep 1")
	if strings.Contains(mounts, "cgroup") {
		t.Fatalf("there are control groups:\n%s", mounts)
	}
	m.quiesced(ctx)
	begin := time.Now()
	waits := m.execLater(ctx, "cat /proc/mounts; cat /proc/1/cgroup")
	for time.Since(begin) < 3*time.Second {
		m.ping(ctx)
		time.Sleep(100 * time.Millisecond)
	}
	select {
	case out := <-waits:
		t.Fatalf("a program was started in a guest that stands still: %q", out)
	default:
	}
	m.released(ctx)
	if out := <-waits; out != mounts+"0::/\n" {
		t.Errorf("afterwards: %q, before: %q", out, mounts)
	}
	gap := m.shell(ctx, `sleep 0.5; awk 'NR > 1 && $2 - last > most { most = $2 - last } { last = $2 } END { print most }' /run/diary`)
	if stood, err := strconv.ParseFloat(strings.TrimSpace(gap), 64); err != nil || stood < 1.5 {
		t.Errorf("what the init started stood still for %s s", gap)
	}
	check(t, m.running.Stop(ctx))
}

// A guest is held again and again while the agent is taken from group to group: by systemd as it starts, and by two services
// then that never leave it alone. Each time it goes on.
func TestRealGuestIsHeldWhileItsAgentIsMoved(t *testing.T) {
	m := newMachine(t)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	m.boot(ctx)
	m.ping(ctx)
	hold := func() {
		t.Helper()
		_, err := m.client.Quiesce(ctx, &agentv1.QuiesceRequest{Hold: true})
		check(t, err)
		m.released(ctx)
	}
	times := 0
	for adopted := false; !adopted && times < 200; times++ {
		hold()
		adopted = strings.Contains(m.shell(ctx, "cat /proc/self/cgroup"), "/banger-agent.service/")
	}
	t.Logf("held %d times until it was a service of systemd's", times)
	m.settled(ctx)
	m.shell(ctx, `adopt=$(sed -n 's/^ExecStart=//p' /run/systemd/system/banger-agent.service)
for name in one two; do systemd-run -p KillMode=process --unit=$name sh -c "while $adopt; do :; done"; done`)
	for range 30 {
		hold()
	}
	if out := m.shell(ctx, "systemctl is-active one two; systemctl stop one two"); out != "active\nactive\n" {
		t.Errorf("who took it along is %q", out)
	}
	m.shutdown(ctx, agentv1.ShutdownRequest_MODE_POWEROFF, vmm.ExitPowerOff)
}
