package e2e

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// counter counts in its memory and answers each line it is sent with the count.
const counter = `use IO::Socket::INET;
my $l = IO::Socket::INET->new(LocalPort => 7000, Listen => 5, ReuseAddr => 1) or die "listen: $!";
my $n = 0;
while (my $c = $l->accept) {
	if (fork == 0) { my $mine = 0; while (<$c>) { $mine++; print $c "$mine $$\n"; $c->flush } exit 0 }
	$n++;
	open my $f, '>', '/run/count'; print $f "$n\n"; close $f;
}
`

// tick starts a program in a VM that counts in a file, ten times a second.
func (w *world) tick(name, file string) {
	w.t.Helper()
	w.guest(name, `setsid perl -e '$| = 1; for (;;) { open F, ">", "`+file+`.new"; print F ++$i, "\n"; close F; rename "`+file+`.new", "`+file+`"; select undef, undef, undef, 0.1 }' >/dev/null 2>&1 &`)
	w.guest(name, "until test -s "+file+"; do sleep 0.2; done")
}

// ticks checks that it goes on.
func (w *world) ticks(name, file string) {
	w.t.Helper()
	w.guest(name, "a=$(cat "+file+"); i=0; until [ $(cat "+file+") -gt $a ]; do i=$((i+1)); [ $i -lt 150 ] || exit 1; sleep 0.2; done")
}

// TestSuspend takes a VM with programs at work through suspend and resume, over a daemon's death as well.
func TestSuspend(t *testing.T) {
	w := newWorld(t)
	w.banger("template", "warm", "--memory", "512M") // none of this shape is made meanwhile, whose machine would be counted
	w.banger("vm", "create", "web", "--memory", "512M")
	w.guest("web", "cat >/root/counter.pl <<'EOT'\n"+counter+"EOT\nsetsid perl /root/counter.pl >/root/counter.log 2>&1 &")
	w.guest("web", "i=0; until grep -q ':1B58 ' /proc/net/tcp; do i=$((i+1)); [ $i -lt 300 ]; sleep 0.1; done")
	before := w.show("web")
	boot := w.guest("web", "cat /proc/sys/kernel/random/boot_id")
	conn, err := net.DialTimeout("tcp", before.IP+":7000", 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	lines := bufio.NewReader(conn)
	said := say(t, conn, lines)
	session := w.session("web")

	for round, meanwhile := range []func(){
		func() {},
		func() { w.killDaemon() }, // while it is suspended
		func() {},                 // saved by a daemon that did not start it
	} {
		if round == 2 {
			w.killDaemon()
		}
		w.guest("web", fmt.Sprintf("echo %d >/root/round", round))
		begin := time.Now()
		w.banger("vm", "suspend", "web")
		took := time.Since(begin)
		v := w.await("web", "suspended", 0)
		if left := append(w.taps(), w.vmms()...); len(left) > 0 || v.PID != 0 {
			t.Errorf("round %d: a suspended VM keeps %v, pid %d", round, left, v.PID)
		}
		t.Logf("round %d: suspended in %v, its memory takes %d MB", round, took, allocated(t, filepath.Join(v.Directory, "suspended"))>>20)
		if r := w.try("vm", "exec", "web", "--", "true"); r.code != 4 || !strings.Contains(r.stderr, "vm resume web") {
			t.Errorf("exec in a suspended VM: %+v", r)
		}
		meanwhile()
		begin = time.Now()
		w.banger("vm", "resume", "web")
		t.Logf("round %d: resumed in %v", round, time.Since(begin))
		clockIsRightNow(t, w)
		next := say(t, conn, lines)
		if next.count != said.count+1 || next.pid != said.pid {
			t.Errorf("round %d: the connection said %+v, before that %+v", round, next, said)
		}
		said = next
		if round == 0 {
			session("goes on")
		}
		fresh, err := net.DialTimeout("tcp", before.IP+":7000", 10*time.Second)
		if err != nil {
			t.Fatalf("round %d: the listener is gone: %v", round, err)
		}
		say(t, fresh, bufio.NewReader(fresh))
		fresh.Close()
		if out := w.guest("web", "cat /root/round /proc/sys/kernel/random/boot_id"); out != fmt.Sprintf("%d\n%s", round, boot) {
			t.Errorf("round %d: the guest has %q", round, out)
		}
		if v := w.show("web"); v.IP != before.IP || v.State != "running" || v.Directory != before.Directory {
			t.Errorf("round %d: %+v, was %+v", round, v, before)
		}
		if r := w.try("vm", "ssh", "web", "--", "hostname"); r.code != 0 || strings.TrimSpace(r.stdout) != "web" {
			t.Errorf("round %d: ssh: %+v", round, r)
		}
	}
	t.Log(w.banger("vm", "events", "web", "-n", "30"))
	suspendedCannot(t, w)
}

// session opens an SSH session, and returns a function that sends a line on it and wants it back. A client ends
// one that is not answered for a minute.
func (w *world) session(name string) (say func(line string)) {
	w.t.Helper()
	cmd := w.command(w.t.Context(), "vm", "ssh", name, "--", "cat")
	in, err1 := cmd.StdinPipe()
	out, err2 := cmd.StdoutPipe()
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	if err := errors.Join(err1, err2, cmd.Start()); err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() {
		_ = in.Close()
		_ = cmd.Wait() // its end is the test's
	})
	lines := bufio.NewReader(out)
	say = func(line string) {
		w.t.Helper()
		_, err := fmt.Fprintln(in, line)
		if err != nil {
			w.t.Fatalf("the session has ended: %v: %s", err, &stderr)
		}
		if got, err := lines.ReadString('\n'); got != line+"\n" {
			w.t.Fatalf("the session answers %q, %v: %s", got, err, &stderr)
		}
	}
	say("begins")
	return say
}

// suspendedCannot damages the saved memory: the VM says so, and boots with its disks.
func suspendedCannot(t *testing.T, w *world) {
	w.banger("vm", "stop", "--suspend", "web")
	state := filepath.Join(w.show("web").Directory, "suspended", "state")
	data, err := os.ReadFile(state)
	if err != nil {
		t.Fatal(err)
	}
	data[len(data)/2] ^= 1
	if err := os.WriteFile(state, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if r := w.try("vm", "resume", "web"); r.code != 5 || !strings.Contains(r.stderr, "vm start web --cold") {
		t.Errorf("resume from damaged memory: %+v", r)
	}
	w.await("web", "suspended", 0)
	w.banger("vm", "start", "--cold", "web")
	if out := w.guest("web", "cat /root/round"); out != "2" {
		t.Errorf("after a cold start: %q", out)
	}
}

// clockIsRightNow compares the clocks as soon as there is a guest to ask.
func clockIsRightNow(t *testing.T, w *world) {
	t.Helper()
	const allowed = 100 * time.Millisecond
	begin := time.Now()
	out := w.guest("web", "date +%s.%N")
	end := time.Now()
	seconds, err := strconv.ParseFloat(out, 64)
	if err != nil {
		t.Fatal(err)
	}
	guest := time.Unix(0, int64(seconds*1e9))
	if guest.Before(begin.Add(-allowed)) || guest.After(end.Add(allowed)) {
		t.Errorf("the guest's clock says %v between %v and %v", guest, begin, end)
	}
}

type answer struct{ count, pid int }

func say(t *testing.T, conn net.Conn, lines *bufio.Reader) (a answer) {
	t.Helper()
	if err := conn.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Fprintln(conn, "hello"); err != nil {
		t.Fatal(err)
	}
	line, err := lines.ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fmt.Sscan(line, &a.count, &a.pid); err != nil {
		t.Fatalf("%q: %v", line, err)
	}
	return a
}

// vmms lists the VMMs of this world.
func (w *world) vmms() []string {
	var found []string
	for _, p := range w.processes() {
		if strings.Contains(p, "qemu") {
			found = append(found, p)
		}
	}
	return found
}

func allocated(t *testing.T, dir string) int64 {
	t.Helper()
	var sum int64
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil {
			sum += info.Size()
		}
	}
	return sum
}
