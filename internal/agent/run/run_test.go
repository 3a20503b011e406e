package run

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger/internal/agent/serve"
	"banger/internal/hosttest"
)

func TestMain(m *testing.M) {
	// As the agent does: what its parent has it ignore, as a shell without job control does, its programs would ignore, too.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGINT, syscall.SIGQUIT)
	hosttest.Main(m)
}

type result struct {
	serve.Exit
	out, err string
	pid      int
}

// first is closed when a program writes for the first time: it runs.
type first struct {
	once sync.Once
	word chan struct{}
}

func newFirst() *first { return &first{word: make(chan struct{})} }

func (f *first) Write(p []byte) (int, error) {
	f.once.Do(func() { close(f.word) })
	return len(p), nil
}

// do runs p; what it wrote is in the result.
func do(t *testing.T, ctx context.Context, p serve.Program) result {
	t.Helper()
	var out, errs bytes.Buffer
	var r result
	if p.Stdout == nil {
		p.Stdout = io.Discard
	}
	p.Stdout, p.Stderr = io.MultiWriter(&out, p.Stdout), &errs
	started := p.Started
	p.Started = func(pid int) {
		r.pid = pid
		if started != nil {
			started(pid)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	if p.Dir == "" {
		p.Dir = "/"
	}
	if p.User == "" {
		p.User = strconv.Itoa(os.Getuid())
	}
	r.Exit = Runner{Root: "/"}.Run(ctx, p)
	r.out, r.err = out.String(), errs.String()
	return r
}

func sh(script string) []string { return []string{"sh", "-c", script} }

func TestExitAndOutput(t *testing.T) {
	for _, c := range []struct {
		name string
		argv []string
		want result
	}{
		{"both outputs", sh("echo out; echo err >&2; exit 7"), result{Exit: serve.Exit{Code: 7}, out: "out\n", err: "err\n"}},
		{"signal", sh("kill -TERM $$"), result{Exit: serve.Exit{Code: 143, Signal: syscall.SIGTERM}}},
		{"no stdin", sh("cat; echo end"), result{out: "end\n"}},
		{"background child holds the output", sh("sleep 60 & echo done"), result{out: "done\n"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			begin := time.Now()
			got := do(t, t.Context(), serve.Program{Argv: c.argv})
			if got.Exit != c.want.Exit || got.out != c.want.out || got.err != c.want.err {
				t.Errorf("got %+v, want %+v", got, c.want)
			}
			if took := time.Since(begin); took > 20*time.Second {
				t.Errorf("took %v", took)
			}
		})
	}
}

func TestNotStarted(t *testing.T) {
	plain := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(plain, []byte("no program"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		p    serve.Program
		code int
	}{
		{serve.Program{Argv: []string{"no-such-program"}}, 127},
		{serve.Program{Argv: []string{"/no/such/program"}}, 127},
		{serve.Program{Argv: []string{plain}}, 126},
		{serve.Program{Argv: []string{"true"}, Dir: "/no/such/dir"}, 126},
		{serve.Program{Argv: []string{"true"}, User: "no-such-user"}, 126},
	} {
		got := do(t, t.Context(), c.p)
		if got.Code != c.code || got.Error == "" || got.pid != 0 {
			t.Errorf("%v: got %+v, want code %d and a reason", c.p.Argv, got, c.code)
		}
	}
}

func TestStdin(t *testing.T) {
	blob := strings.Repeat("0123456789abcdef", 100_000)
	got := do(t, t.Context(), serve.Program{Argv: sh("cat"), Stdin: strings.NewReader(blob)})
	if got.out != blob {
		t.Errorf("%d bytes came back of %d", len(got.out), len(blob))
	}
}

// slow takes its time over each write, as a client on a slow line does.
type slow struct{ n int }

func (s *slow) Write(p []byte) (int, error) {
	time.Sleep(40 * time.Millisecond)
	s.n += len(p)
	return len(p), nil
}

func TestSlowReaderGetsAll(t *testing.T) {
	const size = 60_000 // fits the pipe: the program ends long before the reader does
	out := &slow{}
	e := Runner{Root: "/"}.Run(t.Context(), serve.Program{
		Argv: sh(fmt.Sprintf("head -c %d /dev/zero; head -c %d /dev/zero", size, size)), Dir: "/", Stdout: out, Stderr: io.Discard,
	})
	if e.Code != 0 || out.n != 2*size {
		t.Errorf("got %d of %d bytes, %+v", out.n, 2*size, e)
	}
}

func TestSignalsReachTheGroup(t *testing.T) {
	signals, ready := make(chan syscall.Signal, 1), newFirst()
	go func() {
		<-ready.word
		signals <- syscall.SIGINT
	}()
	got := do(t, t.Context(), serve.Program{
		Argv: sh("trap 'echo caught; exit 3' INT; echo ready; sleep 20 & wait"), Signals: signals, Stdout: ready,
	})
	if got.Code != 3 || got.out != "ready\ncaught\n" {
		t.Errorf("got %+v", got)
	}
}

func TestCallerGoes(t *testing.T) {
	for _, script := range []string{"sleep 60", "trap '' HUP; sleep 60 & sleep 60"} {
		ctx, cancel := context.WithCancel(t.Context())
		got := do(t, ctx, serve.Program{Argv: sh(script), Started: func(int) { time.AfterFunc(200*time.Millisecond, cancel) }})
		if got.Signal != syscall.SIGHUP && got.Signal != syscall.SIGKILL {
			t.Errorf("%q: got %+v", script, got)
		}
		left := members(t, got.pid)
		for end := time.Now().Add(5 * time.Second); len(left) > 0 && time.Now().Before(end); left = members(t, got.pid) {
			time.Sleep(5 * time.Millisecond) // who is killed dies when it is its turn on a processor
		}
		if len(left) > 0 {
			t.Errorf("%q: its group lives on: %v", script, left)
		}
	}
}

// members lists the processes of a group, the dead ones that nobody has reaped aside.
func members(t *testing.T, group int) []string {
	t.Helper()
	stats, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if err != nil {
			continue
		}
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:])) // state, parent, group
		if f[2] == strconv.Itoa(group) && f[0] != "Z" {
			out = append(out, string(b))
		}
	}
	return out
}

// keyboard types a line once the program has said something, then waits for the end.
func keyboard(ctx context.Context, ready *first, line string) io.Reader {
	r, w := io.Pipe()
	go func() {
		select {
		case <-ready.word:
			fmt.Fprint(w, line)
		case <-ctx.Done():
		}
		<-ctx.Done()
		w.Close()
	}()
	return r
}

func TestTerminal(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	resize, ready := make(chan serve.Size, 1), newFirst()
	go func() {
		<-ready.word
		resize <- serve.Size{Rows: 30, Columns: 101}
	}()
	const script = "tty; echo $TERM; read x; for i in $(seq 200); do stty size | grep -q '30 101' && break; sleep 0.1; done; stty size; echo got $x; exit 5"
	got := do(t, ctx, serve.Program{
		Argv: sh(script), Terminal: &serve.Size{Rows: 24, Columns: 80}, Stdin: keyboard(ctx, ready, "hello\n"), Resize: resize, Stdout: ready,
	})
	if got.Code != 5 || !strings.Contains(got.out, "/dev/pts/") || !strings.Contains(got.out, "xterm") ||
		!strings.Contains(got.out, "30 101") || !strings.Contains(got.out, "got hello") {
		t.Errorf("got %+v", got)
	}
}

func TestTerminalInterruptAndEnd(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	size := &serve.Size{Rows: 24, Columns: 80}
	ready := newFirst()
	got := do(t, ctx, serve.Program{Argv: sh("echo ready; exec sleep 20"), Terminal: size, Stdin: keyboard(ctx, ready, "\x03"), Stdout: ready})
	if got.Signal != syscall.SIGINT || got.Code != 130 {
		t.Errorf("interrupted: got %+v", got)
	}
	got = do(t, ctx, serve.Program{Argv: []string{"cat"}, Terminal: size, Stdin: strings.NewReader("line\n")})
	if got.Code != 0 {
		t.Errorf("end of input: got %+v", got)
	}
}

func TestLogin(t *testing.T) {
	root := t.TempDir()
	write := func(name, text string) {
		t.Helper()
		f := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(f), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(f, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("etc/passwd", "root:x:0:0::/root:/bin/bash\nbroken\nann:x:1000:1001:Ann:/home/ann:\n")
	write("etc/group", "ann:x:1001:\ndocker:x:998:bob,ann\nadm:x:4:bob\n")
	write("etc/default/locale", "# comment\nLANG=\"de_DE.UTF-8\"\n")
	r := Runner{Root: root}
	a, err := r.account("1000")
	if err != nil || a.name != "ann" || a.shell != "/bin/sh" || fmt.Sprint(a.groups) != "[1001 998]" {
		t.Fatalf("got %+v, %v", a, err)
	}
	env := strings.Join(r.loginEnv(a, false), "\n")
	for _, want := range []string{"HOME=/home/ann", "USER=ann", "SHELL=/bin/sh", "LANG=de_DE.UTF-8", "PATH=/usr/local/bin:"} {
		if !strings.Contains(env, want) {
			t.Errorf("no %s in %s", want, env)
		}
	}
	if strings.Contains(env, "TERM=") {
		t.Error("TERM without a terminal")
	}
	if a, err := (Runner{Root: t.TempDir()}).account(""); err != nil || a.home != "/root" {
		t.Errorf("an image without /etc/passwd has no root: %+v, %v", a, err)
	}
}

func TestOutput(t *testing.T) {
	b, err := Output(t.Context(), 5*time.Second, "sh", "-c", "echo some; exit 3")
	if string(b) != "some\n" || err == nil {
		t.Errorf("got %q, %v", b, err)
	}
	if _, err := Output(t.Context(), 50*time.Millisecond, "sleep", "10"); err == nil {
		t.Error("no time limit")
	}
}

func TestManyAtOnce(t *testing.T) {
	var wg sync.WaitGroup
	for i := range 10 {
		wg.Go(func() {
			want := strings.Repeat(strconv.Itoa(i), 50_000)
			got := do(t, t.Context(), serve.Program{Argv: []string{"cat"}, Stdin: strings.NewReader(want)})
			if got.out != want {
				t.Errorf("%d: %d bytes", i, len(got.out))
			}
		})
	}
	wg.Wait()
}

// A program waits until it may be started; one whose caller has gone by then is not.
func TestStartWaitsForItsTurn(t *testing.T) {
	var gate sync.RWMutex
	gate.Lock()
	r := Runner{Root: "/", Starting: gate.RLocker()}
	ctx, cancel := context.WithCancel(t.Context())
	file := filepath.Join(t.TempDir(), "ran")
	gone, stays := make(chan serve.Exit, 1), make(chan serve.Exit, 1)
	go func() { gone <- r.Run(ctx, serve.Program{Argv: []string{"touch", file}}) }()
	go func() { stays <- r.Run(t.Context(), serve.Program{Argv: []string{"true"}}) }()
	cancel()
	select {
	case exit := <-stays:
		t.Fatalf("it was started: %+v", exit)
	case <-time.After(20 * time.Millisecond):
	}
	gate.Unlock()
	if exit := <-stays; exit.Code != 0 || exit.Error != "" {
		t.Errorf("got %+v", exit)
	}
	if exit := <-gone; exit.Code != notExecutable {
		t.Errorf("got %+v", exit)
	}
	if _, err := os.Stat(file); err == nil {
		t.Error("a program was started for nobody")
	}
}

// A program that stands still when its caller goes is not killed before it could hear of that.
func TestHangUpWaitsForWhoStandsStill(t *testing.T) {
	var gate sync.RWMutex
	r := Runner{Root: "/", Starting: gate.RLocker()}
	ctx, cancel := context.WithCancel(t.Context())
	started, ended := make(chan struct{}), make(chan serve.Exit, 1)
	go func() {
		ended <- r.Run(ctx, serve.Program{Argv: []string{"sh", "-c", "trap '' HUP; echo; exec sleep 60"}, Stdout: once{started}, Stderr: io.Discard})
	}()
	<-started
	gate.Lock()
	cancel()
	select {
	case exit := <-ended:
		t.Fatalf("it was killed: %+v", exit)
	case <-time.After(hangUpGrace + hangUpGrace/4):
	}
	gate.Unlock()
	if exit := <-ended; exit.Signal != syscall.SIGKILL {
		t.Errorf("got %+v", exit)
	}
}

// once tells of the first output.
type once struct{ written chan struct{} }

func (o once) Write(p []byte) (int, error) {
	close(o.written)
	return len(p), nil
}

// What a program left in its pipe is read also when the time for it was over before the read began.
func TestLateOutput(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	if _, err := w.WriteString("the end"); err != nil {
		t.Fatal(err)
	}
	if err := r.SetReadDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 100)
	_, late := r.Read(buf)
	if late == nil {
		t.Fatal("a read after its time")
	}
	d := &drain{from: r}
	if n, err := d.present(buf, late); err != nil || string(buf[:n]) != "the end" {
		t.Errorf("%q, %v", buf[:n], err)
	}
	if n, err := d.present(buf, late); n != 0 || err != late {
		t.Errorf("%d bytes of nothing, %v", n, err)
	}
}
