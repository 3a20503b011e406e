package system

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/hosttest/need"
)

// shellFiles is what a shell of the host and its programs are made of.
var shellFiles = []string{"/bin", "/usr/bin", "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"}

// confined runs a shell script in dir under c and returns what it wrote.
func confined(t *testing.T, dir, script string, c *Confinement) string {
	t.Helper()
	c.Execute = append(c.Execute, shellFiles...)
	c.Devices = append(c.Devices, "/dev/null")
	log := filepath.Join(t.TempDir(), "log")
	p, err := Start(StartOptions{Path: "/bin/sh", Args: []string{"-c", script}, Dir: dir, Log: log, Confine: c})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
	case <-time.After(20 * time.Second):
		_ = p.Signal(unix.SIGKILL)
		t.Fatal("the script does not end")
	}
	text, err := os.ReadFile(log)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

func file(t *testing.T, dir, name string) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, []byte(name+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestConfinedToItsFiles(t *testing.T) {
	need.Kernel(t, "Landlock", Confines())
	own, other := t.TempDir(), t.TempDir()
	file(t, own, "own")
	read, hidden := file(t, other, "read"), file(t, other, "hidden")
	script := fmt.Sprintf("cat own; cat %s; echo new >made && cat made && rm made; cat %s; echo x >>%s; echo x >>%s; ls %s; echo end",
		read, hidden, read, hidden, other)
	out := confined(t, own, script, &Confinement{Read: []string{read}, Write: []string{own, filepath.Join(own, "missing")}})
	for _, want := range []string{"own\n", "read\n", "new\n", "end\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("it could not do what it may, %q is missing:\n%s", want, out)
		}
	}
	if strings.Contains(out, "hidden\n") || strings.Count(out, "ermission denied") != 4 {
		t.Errorf("it could do what it may not:\n%s", out)
	}
	for _, path := range []string{read, hidden} {
		if text, err := os.ReadFile(path); err != nil || strings.Contains(string(text), "x") {
			t.Errorf("%s was written to: %q, %v", path, text, err)
		}
	}
	if _, err := os.ReadFile(hidden); err != nil {
		t.Errorf("we are confined as well: %v", err)
	}
}

func TestConfinedForGood(t *testing.T) {
	var ours unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &ours); err != nil {
		t.Fatal(err)
	}
	// The limits come a moment after the start.
	script := "until [ $(ulimit -n) = 64 ]; do sleep 0.01; done; ulimit -c; while read line; do echo $line; done </proc/self/status"
	out := confined(t, "/", script, &Confinement{
		Read: []string{"/proc"}, Limits: map[int]uint64{unix.RLIMIT_NOFILE: 64, unix.RLIMIT_CORE: 0},
	})
	if !strings.HasPrefix(out, "0\n") || !strings.Contains(out, "NoNewPrivs: 1\n") {
		t.Errorf("it has rights or limits of ours:\n%s", out)
	}
	var after unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &after); err != nil || after != ours {
		t.Errorf("our own limits became %+v, %v", after, err)
	}
	if status, err := os.ReadFile("/proc/self/status"); err != nil || !strings.Contains(string(status), "NoNewPrivs:\t0") {
		t.Errorf("we have given up privileges ourselves: %v", err)
	}
}
