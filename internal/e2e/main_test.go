package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/hosttest/need"
)

const commandLimit = 4 * time.Minute

// insideVariable marks the copy of this test that runs in its own network namespace.
const insideVariable = "BANGER_E2E_INSIDE"

// templatesVariable names the directory of the templates that all tests of a run share. With coldVariable set
// they share none: VMs boot until each test's daemon has made its own.
const (
	templatesVariable = "BANGER_E2E_TEMPLATES"
	coldVariable      = "BANGER_E2E_COLD"
)

// TestMain runs the tests in a fresh network namespace, so that no bridge, TAP device or rule of the host
// is touched. Without root each test says that it needs it.
func TestMain(m *testing.M) {
	if os.Getenv(insideVariable) != "" {
		if out, err := exec.Command("ip", "link", "set", "lo", "up").CombinedOutput(); err != nil {
			fmt.Fprintln(os.Stderr, "e2e: no loopback device:", err, string(out))
			os.Exit(1)
		}
	}
	if os.Getenv(insideVariable) != "" || os.Geteuid() != 0 {
		os.Exit(m.Run())
	}
	templates, err := os.MkdirTemp("", "bgr-e2e-templates-")
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e:", err)
		os.Exit(1)
	}
	code := inside(templates)
	os.RemoveAll(templates)
	os.Exit(code)
}

// inside runs the tests in a copy of this process, in a network namespace of its own.
func inside(templates string) int {
	self := exec.Command("/proc/self/exe", os.Args[1:]...)
	self.Stdout, self.Stderr = os.Stdout, os.Stderr
	mirror := templates + ".sock"
	self.Env = append(os.Environ(), insideVariable+"=1", templatesVariable+"="+templates, mirrorSocketVariable+"="+mirror)
	end, err := serveMirror(mirror)
	if err != nil {
		fmt.Fprintln(os.Stderr, "e2e: no way to the mirror:", err)
		return 1
	}
	defer end()
	self.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	signal.Ignore(os.Interrupt) // it reaches the copy too, whose answer counts
	err = self.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		fmt.Fprintln(os.Stderr, "e2e: no network namespace:", err)
		return 1
	}
	return self.ProcessState.ExitCode()
}

// world is one private banger.
type world struct {
	t   *testing.T
	dir string
	env []string
}

// newWorld gives the test a banger with the prepared kernel and image, and a template of its default VM. At
// the end its daemon is stopped, and nothing of it may be left on the host.
func newWorld(t *testing.T) *world {
	t.Helper()
	w := newColdWorld(t)
	if os.Getenv(coldVariable) != "" {
		return w
	}
	cache := filepath.Join(w.dir, "cache", "banger")
	if err := os.MkdirAll(cache, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(os.Getenv(templatesVariable), filepath.Join(cache, "templates")); err != nil {
		t.Fatal(err)
	}
	w.banger("template", "warm") // the first test of a run makes it
	return w
}

// newColdWorld is a banger that has no templates yet. It makes its own, some seconds after the first boot.
func newColdWorld(t *testing.T) *world {
	t.Helper()
	need.Root(t)
	prepared := need.VM(t)
	dir, err := os.MkdirTemp("", "bgr-e2e-")
	if err != nil {
		t.Fatal(err)
	}
	w := &world{t: t, dir: dir}
	home := filepath.Join(dir, "state", "banger")
	for _, d := range []string{home, filepath.Join(dir, "run")} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, part := range []string{"images", "kernels"} {
		if err := os.Symlink(filepath.Join(prepared, part), filepath.Join(home, part)); err != nil {
			t.Fatal(err)
		}
	}
	w.env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(dir, "state"), "XDG_CONFIG_HOME="+filepath.Join(dir, "config"),
		"XDG_CACHE_HOME="+filepath.Join(dir, "cache"), "XDG_RUNTIME_DIR="+filepath.Join(dir, "run"))
	t.Cleanup(w.end)
	return w
}

// end deletes all VMs and proves that nothing is left.
func (w *world) end() {
	t := w.t
	if t.Failed() {
		w.evidence()
	}
	for _, v := range w.list() {
		w.try("vm", "delete", "--force", "--yes", v.Name)
	}
	w.try("daemon", "stop") // which also ends the machine of a template that it is making
	if left := w.taps(); len(left) > 0 {
		t.Errorf("TAP devices left: %v", left)
	}
	if r := w.try("internal", "clean"); r.code != 0 {
		t.Errorf("clean: %+v", r)
	}
	if left := devices(t); len(left) > 0 {
		t.Errorf("network devices left: %v", left)
	}
	if left := w.processes(); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
	if os.Getenv("BANGER_TEST_KEEP") == "" {
		if err := os.RemoveAll(w.dir); err != nil {
			t.Error(err)
		}
	}
}

// evidence prints what a reader needs after a failure.
func (w *world) evidence() {
	logs, _ := filepath.Glob(filepath.Join(w.dir, "state/banger/vms/*/*.log"))
	for _, path := range append(logs, filepath.Join(w.dir, "state/banger/bangerd.log")) {
		data, err := os.ReadFile(path)
		if err != nil {
			continue
		}
		w.t.Logf("%s:\n%s", path, data[max(0, len(data)-4000):])
	}
}

// result is what a command line gave.
type result struct {
	stdout, stderr string
	code           int
}

// try runs banger and takes any exit code.
func (w *world) try(args ...string) result {
	w.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	return w.run(ctx, "", args...)
}

func (w *world) run(ctx context.Context, stdin string, args ...string) result {
	w.t.Helper()
	cmd := w.command(ctx, args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdin, cmd.Stdout, cmd.Stderr = strings.NewReader(stdin), &stdout, &stderr
	err := cmd.Run()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		w.t.Fatalf("banger %s: %v", strings.Join(args, " "), err)
	}
	return result{stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()}
}

func (w *world) command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "../../bin/banger", args...)
	cmd.Env = w.env
	return cmd
}

// banger runs a command that must succeed and returns its standard output.
func (w *world) banger(args ...string) string {
	w.t.Helper()
	r := w.try(args...)
	if r.code != 0 {
		w.t.Fatalf("banger %s: exit %d\n%s%s", strings.Join(args, " "), r.code, r.stdout, r.stderr)
	}
	return strings.TrimSpace(r.stdout)
}

// guest runs a shell line in a VM over the guest channel.
func (w *world) guest(name, script string) string {
	w.t.Helper()
	return w.banger("vm", "exec", name, "--", "sh", "-c", script)
}

type shown struct {
	ID, Name, State, Error, IP, Directory string
	PID                                   int
}

func (w *world) list() []shown {
	w.t.Helper()
	var all []shown
	r := w.try("vm", "list", "-o", "json")
	if err := json.Unmarshal([]byte(r.stdout), &all); err != nil {
		w.t.Errorf("vm list: %v\n%s%s", err, r.stdout, r.stderr)
	}
	return all
}

func (w *world) show(name string) shown {
	w.t.Helper()
	var v shown
	if err := json.Unmarshal([]byte(w.banger("vm", "show", name, "-o", "json")), &v); err != nil {
		w.t.Fatal(err)
	}
	return v
}

// await polls until a VM is in a state, at most for limit.
func (w *world) await(name, state string, limit time.Duration) shown {
	w.t.Helper()
	deadline := time.Now().Add(limit)
	for {
		v := w.show(name)
		if v.State == state {
			return v
		}
		if time.Now().After(deadline) {
			w.t.Fatalf("%s is %s (%s) after %v, not %s", name, v.State, v.Error, limit, state)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// taps lists banger's TAP devices in this network namespace that a machine has open; the others wait for VMs. The kernel is
// asked: /sys shows the devices of the namespace in which it was mounted.
func (w *world) taps() []string {
	out, err := exec.Command("ip", "-brief", "link").Output()
	if err != nil {
		w.t.Errorf("list network devices: %v", err)
	}
	var taps []string
	for line := range strings.Lines(string(out)) {
		name, rest, _ := strings.Cut(line, " ")
		if strings.HasPrefix(name, "tap-pool-") && strings.Contains(rest, "LOWER_UP") {
			taps = append(taps, name)
		}
	}
	return taps
}

// devices lists all network devices that banger may have made in this namespace.
func devices(t *testing.T) []string {
	t.Helper()
	var found []string
	links, err := net.Interfaces()
	if err != nil {
		t.Error(err)
	}
	for _, l := range links {
		for _, prefix := range []string{"tap-pool-", "bgr-", "banger"} {
			if strings.HasPrefix(l.Name, prefix) {
				found = append(found, l.Name)
			}
		}
	}
	return found
}

// processes lists the processes that work in this world's directories or hold its environment.
func (w *world) processes() []string {
	var found []string
	cwds, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, link := range cwds {
		if cwd, err := os.Readlink(link); err == nil && strings.HasPrefix(cwd, w.dir) {
			cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(link), "cmdline"))
			found = append(found, strings.ReplaceAll(string(cmdline), "\x00", " "))
		}
	}
	return found
}

// killDaemon ends the daemon without a chance to clean up.
func (w *world) killDaemon() {
	w.t.Helper()
	var status struct {
		PID int `json:"pid"`
	}
	if err := json.Unmarshal([]byte(w.banger("daemon", "status", "-o", "json")), &status); err != nil {
		w.t.Fatal(err)
	}
	if err := syscall.Kill(status.PID, syscall.SIGKILL); err != nil {
		w.t.Fatal(err)
	}
}
