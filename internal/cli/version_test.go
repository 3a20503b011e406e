package cli

import (
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"banger/internal/paths"
)

// A daemon that runs and cannot be asked is not one that does not run.
func TestVersionOfADaemonThatCannotBeAsked(t *testing.T) {
	dir, err := os.MkdirTemp("", "bgr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	var out strings.Builder
	e := &Env{Stdout: &out, Stderr: &out, Getenv: func(string) string { return "" }, Now: time.Now, Paths: paths.Under(dir)}
	e.Dial = e.dialDaemon
	run := func() string {
		out.Reset()
		e.Args = []string{"version"}
		if code := Run(t.Context(), e); code != 0 {
			t.Errorf("code %d: %s", code, &out)
		}
		return out.String()
	}
	if got := run(); !strings.HasSuffix(got, "\ndaemon: not running\n") {
		t.Errorf("without one: %q", got)
	}
	if err := e.Paths.Make(); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", e.Paths.Socket())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			c.Close()
		}
	}()
	t.Cleanup(func() { l.Close() })
	if got := run(); !strings.Contains(got, "\ndaemon: cannot reach the daemon") {
		t.Errorf("with one that hangs up: %q", got)
	}
}
