package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"strconv"
	"strings"
	"testing"
	"time"
)

// TestFork makes two VMs of one with programs at work: they go on in all three, which share no identity.
func TestFork(t *testing.T) {
	w := newWorld(t)
	w.banger("vm", "create", "web", "--memory", "512M", "--cold")
	w.banger("vm", "fork", "web", "--name", "early") // its systemd has only begun to start what it wants to
	w.guest("web", "cat >/root/counter.pl <<'EOT'\n"+counter+"EOT\nsetsid perl /root/counter.pl >/root/counter.log 2>&1 &")
	w.guest("web", "i=0; until grep -q ':1B58 ' /proc/net/tcp; do i=$((i+1)); [ $i -lt 300 ]; sleep 0.1; done")
	w.tick("web", "/run/ticks")
	w.guest("web", "cat >/root/draw.pl <<'EOT'\n"+drawer+"EOT\nsetsid perl /root/draw.pl >/dev/null 2>&1 & until test -s /run/draws; do sleep 0.2; done")
	w.guest("web", "echo before >/root/word; echo deep >/etc/word")
	conn, err := net.DialTimeout("tcp", w.show("web").IP+":7000", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	lines := bufio.NewReader(conn)
	said := say(t, conn, lines)

	var forked struct {
		VMs          []shown
		PauseSeconds float64 `json:"pause_seconds"`
	}
	begin := time.Now()
	out := w.banger("vm", "fork", "web", "--name", "left", "--count", "2", "-o", "json")
	took := time.Since(begin)
	if err := json.Unmarshal([]byte(out), &forked); err != nil || len(forked.VMs) != 2 {
		t.Fatalf("%v: %s", err, out)
	}
	t.Logf("two forks in %v, the source stood still for %.3f s", took, forked.PauseSeconds)
	names := []string{"web", "left", "left-2"}
	w.randomNumbersDiffer(names)
	t.Log(w.banger("vm", "events", "web", "-n", "12"))
	t.Log(w.banger("vm", "events", "left", "-n", "20"))
	if next := say(t, conn, lines); next.count != said.count+1 || next.pid != said.pid {
		t.Errorf("the source's connection said %+v, before that %+v", next, said)
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
	for _, name := range names {
		if got := w.guest(name, "hostname; cat /etc/hostname /root/word /etc/word"); got != name+"\n"+name+"\nbefore\ndeep" {
			t.Errorf("%s: %q", name, got)
		}
		w.ticks(name, "/run/ticks")
		w.guest(name, "echo "+name+" >/root/word; sync")
		clockIsRight(t, w, name)
		if r := w.try("vm", "ssh", name, "--", "hostname"); strings.TrimSpace(r.stdout) != name { // the host key is checked
			t.Errorf("ssh %s: %+v", name, r)
		}
		fresh, err := net.DialTimeout("tcp", w.show(name).IP+":7000", 10*time.Second)
		if err != nil {
			t.Fatalf("%s does not listen any more: %v", name, err)
		}
		say(t, fresh, bufio.NewReader(fresh))
		fresh.Close()
	}
	for _, name := range names { // only the source still has the connection
		want := map[string]int{"web": 1}[name]
		w.guest(name, fmt.Sprintf(`i=0; until [ "$(awk '$4 == "01" && $2 ~ /:1B58$/' /proc/net/tcp | wc -l)" = %d ]; do i=$((i+1)); [ $i -lt 100 ] || exit 1; sleep 0.1; done`, want))
		w.settled(name)
		if got := w.guest(name, "cat /root/word"); got != name {
			t.Errorf("%s: %q", name, got)
		}
	}
	w.settled("early")
	if r := w.try("vm", "ssh", "early", "--", "hostname; ls -d /*/log/journal/$(cat /etc/machine-id) >&2"); r.stdout != "early\n" || r.code != 0 {
		t.Errorf("early: %+v", r)
	}
	w.banger("vm", "delete", "--force", "early")
	forksLive(t, w)
}

// drawer draws random numbers, and writes each down with the time that it has run itself: what two machines have
// drawn before one became two has the same time in both.
const drawer = `open R, "<", "/dev/urandom"; open O, ">", "/run/draws";
for (;;) {
	sysread R, $b, 16; open S, "<", "/proc/self/schedstat"; ($t) = split " ", <S>; close S;
	syswrite O, unpack("H*", $b) . " $t\n"; select undef, undef, undef, 0.02
}
`

// randomNumbersDiffer: a program that was drawing when its machine was copied draws other numbers in each. The copy's
// kernel hears from its machine what it is, which takes it a moment: what was drawn twice until then is only told.
func (w *world) randomNumbersDiffer(names []string) {
	w.t.Helper()
	drawn := map[string]string{} // number to the time it was drawn at
	twice := 0
	begun := map[string]int{}
	for _, name := range names {
		n, err := strconv.Atoi(w.guest(name, "wc -l </run/draws"))
		if err != nil {
			w.t.Fatal(err)
		}
		begun[name] = n
	}
	for _, name := range names {
		at := 0
		for line := range strings.Lines(w.guest(name, fmt.Sprintf("until [ $(wc -l </run/draws) -gt %d ]; do sleep 0.2; done; cat /run/draws", begun[name]+20))) {
			at++
			number, when, _ := strings.Cut(strings.TrimSpace(line), " ")
			other, known := drawn[number]
			drawn[number] = when
			if !known || other == when {
				continue
			}
			if twice++; at > begun[name] {
				w.t.Errorf("%s draws what another one drew: %s", name, line)
			}
		}
	}
	w.t.Logf("%d of %d random numbers were drawn twice in the first moment after the split", twice, len(drawn))
}

// forksLive: of forks there are forks, they boot from their disks, and a clone of one that is stopped does.
func forksLive(t *testing.T, w *world) {
	w.banger("vm", "delete", "--force", "web")
	w.banger("vm", "fork", "left", "--rm")
	if got := w.guest("left-fork-1", "hostname; cat /root/word"); got != "left-fork-1\nleft" {
		t.Errorf("fork of a fork: %q", got)
	}
	w.banger("vm", "stop", "left-fork-1", "left-2")
	if r := w.try("vm", "show", "left-fork-1"); r.code != 3 {
		t.Errorf("an ephemeral fork that was stopped: %+v", r)
	}
	w.banger("vm", "clone", "left-2", "twin")
	w.banger("vm", "start", "twin", "left-2")
	one, two := w.guest("left-2", "hostname; cat /root/word; cat /etc/machine-id"), w.guest("twin", "hostname; cat /root/word; cat /etc/machine-id")
	if !strings.HasPrefix(one, "left-2\nleft-2\n") || !strings.HasPrefix(two, "twin\nleft-2\n") || one[len(one)-32:] == two[len(two)-32:] {
		t.Errorf("%q and its clone %q", one, two)
	}
}
