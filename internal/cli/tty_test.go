package cli

import (
	"bytes"
	"context"
	"io"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/creack/pty"
	"golang.org/x/sys/unix"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/hosttest/need"
)

// terminal is a pseudo-terminal with a person at it.
type terminal struct {
	person *os.File // the side that types and reads
	tty    *os.File
	mu     sync.Mutex
	seen   bytes.Buffer // guarded by mu
	ended  chan struct{}
}

func newTerminal(t *testing.T) *terminal {
	t.Helper()
	person, tty, err := pty.Open()
	if err != nil {
		need.Missing(t, "kernel", "no pseudo-terminals: "+err.Error())
	}
	if err := pty.Setsize(tty, &pty.Winsize{Rows: 30, Cols: 100}); err != nil {
		t.Fatal(err)
	}
	x := &terminal{person: person, tty: tty, ended: make(chan struct{})}
	go func() {
		defer close(x.ended)
		_, _ = io.Copy(x, person) // ends with EIO when the tty is closed
	}()
	t.Cleanup(func() { _ = person.Close() })
	return x
}

func (x *terminal) Write(p []byte) (int, error) {
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.seen.Write(p)
}

// screen ends the terminal and returns all that was shown.
func (x *terminal) screen() string {
	_ = x.tty.Close()
	select {
	case <-x.ended:
	case <-time.After(20 * time.Second):
	}
	x.mu.Lock()
	defer x.mu.Unlock()
	return x.seen.String()
}

// at makes e's user sit at x. Standard output stays a buffer, as with "banger ... | cat".
func (x *terminal) at(e *Env) {
	e.Stdin, e.Stderr = x.tty, x.tty
}

func (x *terminal) types(t *testing.T, text string) {
	t.Helper()
	if _, err := x.person.WriteString(text); err != nil {
		t.Fatal(err)
	}
}

func TestDeleteAsksAtATerminal(t *testing.T) {
	for answer, kept := range map[string]bool{"y\n": false, "yes\n": false, "\n": true, "n\n": true, "quatsch\n": true} {
		s := newSession(t, "web=stopped")
		x := newTerminal(t)
		e, _, _ := s.env("vm", "delete", "web")
		x.at(e)
		x.types(t, answer)
		code := Run(context.Background(), e)
		if _, there := s.world.vms["web"]; there != kept || (code == 130) != kept {
			t.Errorf("answer %q: kept %t, code %d", answer, there, code)
		}
		if screen := x.screen(); !strings.Contains(screen, "Delete web and the disks") {
			t.Errorf("screen %q", screen)
		}
	}
}

// What runs is put back when the person says so; of one that does not run nothing is asked, and --yes is an answer.
func TestSnapshotRestoreAsksAtATerminal(t *testing.T) {
	const question = "Put it back to v1, and lose what it did"
	for _, c := range []struct {
		state, answer, flag string
		asked, done         bool
	}{
		{"running", "y\n", "", true, true},
		{"running", "\n", "", true, false},
		{"running", "no\n", "", true, false},
		{"running", "", "--yes", false, true},
		{"stopped", "", "", false, true},
		{"suspended", "", "", false, true},
	} {
		s := newSession(t, "web="+c.state)
		x := newTerminal(t)
		e, _, _ := s.env(strings.Fields("vm snapshot restore web v1 " + c.flag)...)
		x.at(e)
		x.types(t, c.answer)
		code := Run(context.Background(), e)
		if (len(s.world.restored) == 1) != c.done || (code == 0) != c.done {
			t.Errorf("%+v: code %d, calls %v", c, code, s.world.restored)
		}
		if c.done && s.world.restored[0].GetRunning() != (c.state == "running") {
			t.Errorf("%+v: asked for %v", c, s.world.restored[0])
		}
		if screen := x.screen(); strings.Contains(screen, question) != c.asked {
			t.Errorf("%+v: screen %q", c, screen)
		}
	}
}

func TestDeleteDoesNotAskWhenTold(t *testing.T) {
	for _, flag := range []string{"--yes", "--force"} {
		s := newSession(t, "web=stopped")
		x := newTerminal(t)
		e, _, _ := s.env("vm", "delete", "web", flag)
		x.at(e)
		if code := Run(context.Background(), e); code != 0 {
			t.Errorf("%s: code %d", flag, code)
		}
	}
}

func TestLiveProgress(t *testing.T) {
	s := newSession(t)
	x := newTerminal(t)
	e, _, _ := s.env()
	e.Stderr = x.tty
	d := e.newDisplay()
	sink := d.sink("")
	half := 0.5
	sink(&bangerv1.Progress{Stage: "bootstrap", Status: bangerv1.Progress_STATUS_STARTED})
	sink(&bangerv1.Progress{Stage: "bootstrap", Status: bangerv1.Progress_STATUS_UPDATE, Message: "unpacking", Fraction: &half})
	sink(&bangerv1.Progress{Status: bangerv1.Progress_STATUS_NOTICE, Message: "no \x1b[31m/dev/kvm"})
	sink(&bangerv1.Progress{Stage: "bootstrap", Status: bangerv1.Progress_STATUS_DONE, DurationNanos: 3e9})
	sink(&bangerv1.Progress{Stage: "brief", Status: bangerv1.Progress_STATUS_DONE, DurationNanos: 1e6})
	sink(&bangerv1.Progress{Stage: "image", Status: bangerv1.Progress_STATUS_STARTED})
	sink(&bangerv1.Progress{Stage: "image", Status: bangerv1.Progress_STATUS_FAILED, DurationNanos: 20e9})
	d.close()
	screen := x.screen()
	for _, want := range []string{"[━━━━━━━━━━          ]  50%  unpacking", "no [31m/dev/kvm\r\n", "✓\x1b[m bootstrap", "3.0 s\r\n", "20 s (failed)\r\n"} {
		if !strings.Contains(screen, want) {
			t.Errorf("%q is not on the screen %q", want, screen)
		}
	}
	if strings.Contains(screen, "brief") {
		t.Errorf("a stage of a millisecond got a line: %q", screen)
	}
	if !strings.HasSuffix(strings.TrimSuffix(screen, "\r\x1b[K"), "\n") {
		t.Errorf("a live line was left: %q", screen)
	}
}

func TestColoursOnlyAtATerminal(t *testing.T) {
	s := newSession(t, "web=running")
	for _, noColour := range []string{"", "1"} {
		x := newTerminal(t)
		e, _, _ := s.env("vm", "list")
		e.Stdout = x.tty
		e.Getenv = func(name string) string {
			if name == "NO_COLOR" {
				return noColour
			}
			return ""
		}
		Run(context.Background(), e)
		painted := strings.Contains(x.screen(), "\x1b[")
		if painted != (noColour == "") {
			t.Errorf("NO_COLOR=%q: painted %t", noColour, painted)
		}
	}
}

func TestExecWithATerminal(t *testing.T) {
	s := newSession(t, "web=running")
	x := newTerminal(t)
	e, out, _ := s.env("vm", "exec", "-t", "web", "--", "cat")
	e.Stdin = x.tty
	codes := make(chan int)
	go func() { codes <- Run(context.Background(), e) }()
	for !rawMode(t, x.tty) {
		time.Sleep(time.Millisecond)
	}
	x.types(t, "abc\x03\x04") // an interrupt is a byte like any other
	if code := <-codes; code != 7 || out.String() != "abc\x03\x04" {
		t.Errorf("code %d, out %q", code, out)
	}
	size := s.world.execed[1].GetExec().GetStart().GetTerminal()
	if size.GetRows() != 30 || size.GetColumns() != 100 {
		t.Errorf("size %v", size)
	}
}

var helpLine = regexp.MustCompile(`banger vm create \[NAME\]`)

func TestHelpGoesToStdout(t *testing.T) {
	s := newSession(t)
	stdout, stderr, code := s.run("vm create -h")
	if code != 0 || stderr != "" || !helpLine.MatchString(stdout) || strings.Contains(stdout, "\x1b[") {
		t.Errorf("code %d, stdout %q, stderr %q", code, stdout, stderr)
	}
}

func rawMode(t *testing.T, tty *os.File) bool {
	t.Helper()
	state, err := unix.IoctlGetTermios(int(tty.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return state.Lflag&unix.ICANON == 0
}

// TestTablesUseTheTerminal: what fits a wider terminal is not cut.
func TestTablesUseTheTerminal(t *testing.T) {
	name := strings.Repeat("long-", 12) + "name"
	s := newSession(t, name+"=failed")
	x := newTerminal(t)
	if err := pty.Setsize(x.tty, &pty.Winsize{Rows: 30, Cols: 130}); err != nil {
		t.Fatal(err)
	}
	e, _, _ := s.env("vm", "list")
	e.Stdout = x.tty
	if code := Run(context.Background(), e); code != 0 {
		t.Errorf("code %d", code)
	}
	if screen := x.screen(); !strings.Contains(screen, name+" ") {
		t.Errorf("cut at 130 columns: %q", screen)
	}
}
