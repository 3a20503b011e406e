package qemu

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"banger/internal/fault"
	"banger/internal/hosttest"
)

const greeting = `{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}}, "capabilities": ["oob"]}}` + "\n"

// serveQMP plays QEMU: it greets, and answers each line by answer, which gets the line's number.
func serveQMP(t *testing.T, answer func(n int) string) net.Conn {
	t.Helper()
	ours, theirs := net.Pipe()
	go func() {
		defer theirs.Close()
		if _, err := io.WriteString(theirs, greeting); err != nil {
			return
		}
		lines := bufio.NewScanner(theirs)
		for n := 1; lines.Scan(); n++ {
			if _, err := io.WriteString(theirs, answer(n)); err != nil {
				return
			}
		}
	}()
	return ours
}

func okay(n int) string { return fmt.Sprintf(`{"return": {"status": "running"}, "id": %d}`+"\n", n) }

func TestMonitor(t *testing.T) {
	defer hosttest.NoGoroutines(t)
	m, err := newMonitor(t.Context(), serveQMP(t, func(n int) string {
		event := `{"event": "SHUTDOWN", "data": {"guest": true, "reason": "guest-reset"}, "timestamp": {"seconds": 1}}` + "\n"
		switch n {
		case 2:
			return event + okay(n)
		case 3:
			return `{"error": {"class": "CommandNotFound", "desc": "no such thing"}, "id": 3}` + "\n"
		}
		return okay(n)
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	var status struct{ Status string }
	if err := m.callFor(t.Context(), "query-status", &status); err != nil || status.Status != "running" {
		t.Errorf("%+v, %v", status, err)
	}
	if got := m.shutdownReason(); got != "guest-reset" {
		t.Errorf("shutdown reason %q", got)
	}
	if err := m.callFor(t.Context(), "nonsense", nil); err == nil || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("a refused command: %v", err)
	}
	if err := m.callFor(t.Context(), "query-status", nil); err != nil {
		t.Errorf("after a refusal: %v", err)
	}
}

// A QEMU that greets and then takes its time to make the machine, as on a loaded host, is waited for.
func TestMonitorOfAMachineThatIsBeingMade(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m, err := newMonitor(t.Context(), serveQMP(t, func(n int) string {
			if n == 1 {
				time.Sleep(2 * qmpTimeout)
			}
			return okay(n)
		}))
		if err != nil {
			t.Fatal(err)
		}
		m.close()
	})
}

func TestMonitorThatIsDeaf(t *testing.T) {
	defer hosttest.NoGoroutines(t)
	m, err := newMonitor(t.Context(), serveQMP(t, func(n int) string {
		switch n {
		case 2:
			return "" // never answered
		case 3:
			return okay(2) + okay(3) // the late answer comes first
		}
		return okay(n)
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if err := m.callFor(ctx, "query-status", nil); fault.KindOf(err) != fault.Timeout {
		t.Errorf("no answer: %v", err)
	}
	if err := m.callFor(t.Context(), "query-status", nil); err != nil {
		t.Errorf("the call after: %v", err)
	}
}

func TestMonitorThatTalksNonsense(t *testing.T) {
	for name, text := range map[string]string{
		"no JSON":         "hello\n",
		"a long line":     strings.Repeat("x", qmpMessage+1) + "\n",
		"hangs up":        "",
		"wrong types":     `{"return": {}, "id": "one"}` + "\n",
		"endless answers": strings.Repeat(okay(7), lateAnswers*4),
	} {
		t.Run(name, func(t *testing.T) {
			defer hosttest.NoGoroutines(t)
			ours, theirs := net.Pipe()
			go func() {
				defer theirs.Close()
				_, _ = io.WriteString(theirs, greeting)
				_, _ = bufio.NewReader(theirs).ReadString('\n')
				_, _ = io.WriteString(theirs, text)
			}()
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			if m, err := newMonitor(ctx, ours); err == nil {
				m.close()
				t.Error("it counts as an answer")
			} else if fault.KindOf(err) == fault.Timeout {
				t.Errorf("found out by time only: %v", err)
			}
		})
	}
}

func TestMonitorWithoutGreeting(t *testing.T) {
	defer hosttest.NoGoroutines(t)
	ours, theirs := net.Pipe()
	defer theirs.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := newMonitor(ctx, ours); fault.KindOf(err) != fault.Timeout {
		t.Errorf("got %v", err)
	}
}

func FuzzMonitor(f *testing.F) {
	f.Add([]byte(greeting + okay(1)))
	f.Add([]byte(`{"QMP":1}` + "\n" + `{"event":"SHUTDOWN","data":[]}` + "\n"))
	f.Fuzz(func(t *testing.T, said []byte) {
		ours, theirs := net.Pipe()
		go func() {
			go func() { _, _ = io.Copy(io.Discard, theirs) }()
			_, _ = theirs.Write(said)
			_ = theirs.Close()
		}()
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
		defer cancel()
		if m, err := newMonitor(ctx, ours); err == nil {
			m.close()
		}
	})
}
