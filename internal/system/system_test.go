package system

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"banger/internal/fault"
	"banger/internal/hosttest"
)

func TestMain(m *testing.M) { hosttest.Main(m) }

// patience is how long tests wait for what should come at once: others may have the processors.
const patience = 20 * time.Second

func sh(script string) Command { return Command{Path: "sh", Args: []string{"-c", script}} }

func TestRunReturnsStdout(t *testing.T) {
	c := sh("cat; pwd; echo noise >&2")
	c.Stdin, c.Dir = strings.NewReader("in\n"), "/"
	var lines []string
	c.OnStderrLine = func(l string) { lines = append(lines, l) }
	out, err := Run(t.Context(), c)
	if err != nil || string(out) != "in\n/\n" {
		t.Fatalf("got %q, %v", out, err)
	}
	if strings.Join(lines, "|") != "noise" {
		t.Errorf("stderr lines: %q", lines)
	}
}

func TestRunToWriter(t *testing.T) {
	var out bytes.Buffer
	c := sh("echo product")
	c.Stdout = &out
	captured, err := Run(t.Context(), c)
	if err != nil || len(captured) != 0 || out.String() != "product\n" {
		t.Fatalf("got %q, writer %q, %v", captured, out.String(), err)
	}
}

func TestRunFailureTellsAllOnce(t *testing.T) {
	_, err := Run(t.Context(), sh("echo half; echo 'no such disk' >&2; exit 3"))
	var exit *ExitError
	if !errors.As(err, &exit) || exit.Code != 3 || exit.Signal != 0 {
		t.Fatalf("got %#v", err)
	}
	for _, want := range []string{"sh -c", "exit status 3", "no such disk"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q lacks %q", err, want)
		}
	}
	if n := strings.Count(err.Error(), "exit status 3"); n != 1 {
		t.Errorf("status is told %d times: %v", n, err)
	}
}

func TestRunKeepsTheEndOfStderr(t *testing.T) {
	c := sh("i=0; while [ $i -lt 3000 ]; do echo line $i >&2; i=$((i+1)); done; exit 1")
	lines := 0
	c.OnStderrLine = func(string) { lines++ }
	_, err := Run(t.Context(), c)
	var exit *ExitError
	if !errors.As(err, &exit) || len(exit.Stderr) > MaxStderr || !strings.HasSuffix(exit.Stderr, "line 2999") {
		t.Fatalf("got %v", err)
	}
	if lines != 3000 {
		t.Errorf("%d lines handed on", lines)
	}
}

func TestRunRefusesEndlessStdout(t *testing.T) {
	_, err := Run(t.Context(), sh("head -c 17000000 /dev/zero"))
	if err == nil || !strings.Contains(err.Error(), "more than") {
		t.Fatalf("got %v", err)
	}
}

func TestRunTimeoutKillsTheGroup(t *testing.T) {
	pidFile := filepath.Join(t.TempDir(), "pid")
	c := sh("sleep 1000 & echo $! > " + pidFile + "; wait")
	pid := ""
	for c.Timeout = 300 * time.Millisecond; pid == "" && c.Timeout < time.Minute; c.Timeout *= 3 { // until the shell got so far
		begin := time.Now()
		_, err := Run(t.Context(), c)
		if fault.KindOf(err) != fault.Timeout {
			t.Fatalf("got %v", err)
		}
		if took := time.Since(begin); took > c.Timeout+patience {
			t.Errorf("took %s", took)
		}
		text, _ := os.ReadFile(pidFile)
		pid = strings.TrimSpace(string(text))
	}
	waitUntil(t, func() bool { return pid != "" && !alive(pid) })
}

func TestRunCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	time.AfterFunc(100*time.Millisecond, cancel)
	_, err := Run(ctx, sh("sleep 100"))
	if fault.KindOf(err) != fault.Interrupted {
		t.Fatalf("got %v", err)
	}
}

func TestRunIsNotHeldUpByAGrandchild(t *testing.T) {
	begin := time.Now()
	_, err := Run(t.Context(), sh("sleep 1000 & exit 0"))
	if took := time.Since(begin); took > waitDelay+patience {
		t.Fatalf("took %s, %v", took, err)
	}
}

func TestRunMissingProgram(t *testing.T) {
	_, err := Run(t.Context(), Command{Path: "no-such-program"})
	if fault.KindOf(err) != fault.Precondition {
		t.Fatalf("got %v", err)
	}
}

func TestFind(t *testing.T) {
	t.Setenv("PATH", "/nowhere")
	if path, err := Find("ldconfig", "libc-bin"); err != nil || !filepath.IsAbs(path) {
		t.Errorf("a program in sbin: %q, %v", path, err)
	}
	_, err := Find("no-such-program", "some-package")
	if fault.KindOf(err) != fault.Precondition || fault.HintOf(err) != "apt install some-package" {
		t.Errorf("a missing program: %v, hint %q", err, fault.HintOf(err))
	}
}

func TestForeground(t *testing.T) {
	for script, want := range map[string]int{"exit 0": 0, "exit 42": 42, "kill -9 $$": 137, "kill -15 $$": 143} {
		if code, err := Foreground(t.Context(), sh(script)); err != nil || code != want {
			t.Errorf("%s: %d, %v", script, code, err)
		}
	}
	if _, err := Foreground(t.Context(), Command{Path: "no-such-program"}); fault.KindOf(err) != fault.Precondition {
		t.Errorf("missing program: %v", err)
	}
}

func TestForegroundForwardsSignals(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	c := sh("trap 'exit 7' TERM; echo ready; while :; do sleep 0.05; done")
	c.Stdout = w
	go func() {
		_, _ = r.Read(make([]byte, 10))
		_ = syscall.Kill(os.Getpid(), syscall.SIGTERM)
	}()
	if code, err := Foreground(t.Context(), c); err != nil || code != 7 {
		t.Fatalf("%d, %v", code, err)
	}
}

func TestStart(t *testing.T) {
	dir := t.TempDir()
	log := filepath.Join(dir, "log")
	p, err := Start(StartOptions{
		Path: "/bin/sh", Args: []string{"-c", "pwd; echo $X >&2; ps -o sid= -p $$; ls /proc/self/fd | wc -l; exit 5"},
		Env: []string{"X=y", "PATH=/bin:/usr/bin"}, Dir: dir, Log: log, NewSession: true,
	})
	if err != nil {
		t.Fatal(err)
	}
	waitDone(t, p)
	if got := p.Status(); got != (ExitStatus{Code: 5, Known: true}) {
		t.Errorf("status %+v", got)
	}
	out, _ := os.ReadFile(log)
	fields := strings.Fields(string(out))
	// ls holds 0, 1, 2 and the directory: nothing of ours is inherited.
	if len(fields) != 4 || fields[0] != dir || fields[1] != "y" || fields[3] != "4" {
		t.Errorf("log: %q", out)
	}
	if info, err := os.Stat(log); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("log's mode: %v, %v", info.Mode(), err)
	}
	if err := p.Signal(syscall.SIGKILL); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal after the end: %v", err)
	}
	if err := p.Close(); err != nil {
		t.Error(err)
	}
}

func TestStartExtraFiles(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	p, err := Start(StartOptions{Path: "/bin/sh", Args: []string{"-c", "echo hello >&3"}, ExtraFiles: []*os.File{w}})
	w.Close()
	if err != nil {
		t.Fatal(err)
	}
	if out, err := io.ReadAll(r); string(out) != "hello\n" {
		t.Errorf("%q, %v", out, err)
	}
	waitDone(t, p)
}

func TestStartMissing(t *testing.T) {
	if _, err := Start(StartOptions{Path: "/no/such/program"}); fault.KindOf(err) != fault.Precondition {
		t.Errorf("got %v", err)
	}
}

func TestKilledChild(t *testing.T) {
	p := sleeper(t)
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitDone(t, p)
	if got := p.Status(); got != (ExitStatus{Code: -1, Signal: syscall.SIGKILL, Known: true}) {
		t.Errorf("status %+v", got)
	}
}

func TestAdopt(t *testing.T) {
	p := sleeper(t)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(syscall.SIGTERM); !errors.Is(err, os.ErrProcessDone) {
		t.Errorf("signal after Close: %v", err)
	}
	again, err := Adopt(p.PID(), p.StartTime())
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-p.Done():
		t.Error("Close closed Done")
	default:
	}
	if err := again.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	waitDone(t, again)
	if _, err := Adopt(p.PID(), p.StartTime()); fault.KindOf(err) != fault.NotFound {
		t.Errorf("adopting the dead: %v", err)
	}
}

func TestAdoptOfAStrangersChild(t *testing.T) {
	// The shell starts it and goes: whatever it is, it is no child of ours.
	out, err := Run(t.Context(), sh("sleep 100 >/dev/null 2>&1 & echo $!"))
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(out)))
	if err != nil {
		t.Fatal(err)
	}
	started, err := StartTime(pid)
	if err != nil {
		t.Fatal(err)
	}
	p, err := Adopt(pid, started)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	waitDone(t, p)
	if p.Status().Known {
		t.Errorf("status of a stranger: %+v", p.Status())
	}
}

func TestAdoptRefusesAReusedNumber(t *testing.T) {
	p := sleeper(t)
	defer p.Close()
	if _, err := Adopt(p.PID(), p.StartTime()+1); fault.KindOf(err) != fault.NotFound {
		t.Errorf("wrong start time: %v", err)
	}
	if err := p.Signal(0); err != nil {
		t.Errorf("the stranger was hit: %v", err)
	}
	for _, pid := range []int{0, -1, 1 << 30} {
		if _, err := Adopt(pid, 1); fault.KindOf(err) != fault.NotFound {
			t.Errorf("pid %d: %v", pid, err)
		}
	}
}

func TestAdoptReapsAZombie(t *testing.T) {
	p := sleeper(t)
	if err := p.Close(); err != nil {
		t.Fatal(err)
	}
	_ = syscall.Kill(p.PID(), syscall.SIGKILL)
	waitUntil(t, func() bool {
		_, err := Adopt(p.PID(), p.StartTime())
		return fault.KindOf(err) == fault.NotFound
	})
	if _, err := StartTime(p.PID()); err == nil {
		t.Error("the zombie is still there")
	}
}

func TestStartTimeOfOddNames(t *testing.T) {
	stat := []byte("7 (a) b (c) S 1 7 7 0 -1 4194560 1 0 0 0 0 0 0 0 20 0 1 0 4242 1 1")
	if got, err := parseStartTime(stat); got != 4242 || err != nil {
		t.Errorf("%d, %v", got, err)
	}
	rapid.Check(t, func(t *rapid.T) {
		_, _ = parseStartTime([]byte(rapid.String().Draw(t, "stat"))) // must not panic
	})
}

func TestDialUnixInALongDirectory(t *testing.T) {
	dir := filepath.Join(t.TempDir(), strings.Repeat("d", 120), strings.Repeat("e", 120))
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := DialUnixIn(t.Context(), dir, "x.sock"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("no socket: %v", err)
	}
	handle, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer handle.Close()
	l, err := net.Listen("unix", "/proc/self/fd/"+strconv.Itoa(int(handle.Fd()))+"/x.sock")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := DialUnixIn(t.Context(), dir, "x.sock")
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}

func sleeper(t *testing.T) *Process {
	t.Helper()
	p, err := Start(StartOptions{Path: "/bin/sleep", Args: []string{"100"}, NewSession: true})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if q, err := Adopt(p.PID(), p.StartTime()); err == nil {
			_ = q.Signal(syscall.SIGKILL)
			waitDone(t, q)
		}
	})
	return p
}

func alive(pid string) bool {
	stat, err := os.ReadFile("/proc/" + pid + "/stat")
	return err == nil && !bytes.Contains(stat, []byte(") Z "))
}

func waitDone(t *testing.T, p *Process) {
	t.Helper()
	select {
	case <-p.Done():
	case <-time.After(patience):
		t.Fatalf("process %d does not end", p.PID())
	}
}

func waitUntil(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatal("it does not come true")
}
