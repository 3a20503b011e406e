package cli

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func TestDaemonLogs(t *testing.T) {
	s := newSession(t)
	if err := os.WriteFile(s.paths.DaemonLog(), []byte("one\ntwo\nthree\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for line, want := range map[string]string{
		"daemon logs": "one\ntwo\nthree\n", "daemon logs -n 1": "three\n", "daemon logs -n 9": "one\ntwo\nthree\n",
	} {
		if stdout, stderr, code := s.run(line); stdout != want || code != 0 {
			t.Errorf("%s: %q, code %d, %s", line, stdout, code, stderr)
		}
	}
}

// TestSeekLines compares with the plain way, on files with lines of all lengths.
func TestSeekLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "log")
	rapid.Check(t, func(t *rapid.T) {
		var text strings.Builder
		for range rapid.IntRange(0, 6).Draw(t, "lines") {
			text.WriteString(strings.Repeat("x", rapid.SampledFrom([]int{0, 1, 100, 32 << 10, 40000}).Draw(t, "length")) + "\n")
		}
		if rapid.Bool().Draw(t, "unfinished") {
			text.WriteString("end")
		}
		n := rapid.IntRange(1, 8).Draw(t, "n")
		if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if err := seekLines(f, n); err != nil {
			t.Fatal(err)
		}
		var got bytes.Buffer
		if _, err := got.ReadFrom(f); err != nil {
			t.Fatal(err)
		}
		if want := lastLines(text.String(), n); got.String() != want {
			t.Fatalf("%d bytes for the last %d lines, want %d", got.Len(), n, len(want))
		}
	})
}

func lastLines(text string, n int) string {
	lines := strings.SplitAfter(text, "\n")
	if lines[len(lines)-1] == "" {
		lines = lines[:len(lines)-1]
	}
	return strings.Join(lines[max(0, len(lines)-n):], "")
}

type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *lockedBuffer) await(t *testing.T, want string) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
		if l.String() == want {
			return
		}
	}
	t.Fatalf("%q, want %q", l, want)
}

// TestFollowSurvivesRotation: the log is renamed and begun anew under its reader.
func TestFollowSurvivesRotation(t *testing.T) {
	s := newSession(t)
	path := s.paths.DaemonLog()
	if err := os.WriteFile(path, []byte("old\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e, _, _ := s.env("daemon", "logs", "-f")
	var out lockedBuffer
	e.Stdout = &out
	ctx, cancel := context.WithCancel(context.Background())
	codes := make(chan int)
	go func() { codes <- Run(ctx, e) }()
	out.await(t, "old\n")
	if err := os.Rename(path, path+".1"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("new\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	out.await(t, "old\nnew\n")
	cancel()
	if code := <-codes; code != 130 {
		t.Errorf("exit code %d", code)
	}
}
