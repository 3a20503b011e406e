package fake_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/guest"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/fake"
	"banger/internal/vmm/vmmtest"
)

func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == fake.Argument {
		os.Exit(fake.Main(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func newDriver(t testing.TB) vmm.Driver {
	t.Helper()
	d, err := fake.New()
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func newMachine(_ testing.TB, dir string) vmm.Machine {
	return vmm.Machine{ID: vm.ID("0a1b2c3d"), Name: "web", Dir: dir, CPUs: 1, MemoryBytes: 512 << 20}
}

func TestConformance(t *testing.T) {
	vmmtest.Run(t, vmmtest.Target{
		New: newDriver, Machine: newMachine, BootTimeout: 30 * time.Second,
		Hang:  []string{fake.ArgHangBoot},
		Panic: []string{fake.ArgPanic}, PanicText: "Kernel panic - not syncing",
		Break: func(m *vmm.Machine) { m.Cmdline = append(m.Cmdline, fake.ArgRefuse) },
	})
}

// start starts a machine in dir with kernel arguments; it is stopped at the end.
func start(t *testing.T, dir string, args ...string) vmm.Running {
	t.Helper()
	m := newMachine(t, dir)
	m.Cmdline = args
	r, err := newDriver(t).Start(t.Context(), m)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Stop(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return r
}

// A start that is given up at any moment leaves no socket behind.
func TestStartGivenUp(t *testing.T) {
	dir := t.TempDir()
	for i := range 40 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Duration(i)*time.Millisecond)
		r, err := newDriver(t).Start(ctx, newMachine(t, dir))
		cancel()
		if err == nil {
			if err := r.Stop(context.Background()); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Lstat(filepath.Join(dir, vmm.GuestSocket)); err == nil {
			t.Fatalf("after %d ms a socket is left", i)
		}
	}
}

// exec runs a program with stdin and returns stdout and the exit.
func exec(t *testing.T, r vmm.Running, stdin string, argv ...string) (string, *agentv1.ExecExited) {
	t.Helper()
	c := guest.NewClient(r.DialGuest)
	defer c.Close()
	stream, err := c.Exec(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer stream.CloseResponse()
	for _, request := range []*agentv1.ExecRequest{
		{Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{Argv: argv, Env: []string{"X=y"}, Stdin: true}}},
		{Input: &agentv1.ExecRequest_Stdin{Stdin: []byte(stdin)}},
		{Input: &agentv1.ExecRequest_StdinEof{StdinEof: true}},
	} {
		// io.EOF: a program that reads nothing may end before all is sent.
		if err := stream.Send(request); err != nil && !errors.Is(err, io.EOF) {
			t.Fatal(err)
		}
	}
	var out strings.Builder
	for {
		answer, err := stream.Receive()
		if err != nil {
			t.Fatalf("%q: %v", argv, err)
		}
		out.Write(answer.GetStdout())
		if e := answer.GetExited(); e != nil {
			return out.String(), e
		}
	}
}

func TestPrograms(t *testing.T) {
	r := start(t, t.TempDir())
	for _, c := range []struct {
		stdin, argv, want string
		code              int32
	}{
		{"", "true", "", 0},
		{"", "false", "", 1},
		{"", "exit 42", "", 42},
		{"", "hostname", "web\n", 0},
		{"", "env", "HOME=/root\nPATH=/usr/bin\nUSER=root\nX=y\n", 0},
		{"some text", "cat", "some text", 0},
		{"", "cat /gone", "", 1},
		{"", "sleep 0.01", "", 0},
		{"echo one; hostname\nexit 3\necho never\n", "", "one\nweb\n", 3},
		{"", "reboot", "", 127},
	} {
		out, exit := exec(t, r, c.stdin, strings.Fields(c.argv)...)
		if out != c.want || exit.GetCode() != c.code {
			t.Errorf("%q: %q, %v", c.argv, out, exit)
		}
	}
}

// TestFilesOutliveTheMachine, and never lie outside it.
func TestFilesOutliveTheMachine(t *testing.T) {
	outer := t.TempDir()
	dir := filepath.Join(outer, "vm")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	r := start(t, dir)
	if _, exit := exec(t, r, "", "write", "../../../state", "kept"); exit.GetCode() != 0 {
		t.Fatal(exit)
	}
	if err := r.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
	if out, exit := exec(t, start(t, dir), "", "cat", "/state"); out != "kept\n" || exit.GetCode() != 0 {
		t.Errorf("%q, %v", out, exit)
	}
	if entries, err := os.ReadDir(outer); err != nil || len(entries) != 1 {
		t.Errorf("outside: %v, %v", entries, err)
	}
}

func TestFaults(t *testing.T) {
	dying := start(t, t.TempDir(), fake.ArgDieAfter+"50ms")
	slow := start(t, t.TempDir(), fake.ArgSlowBoot+"200ms")
	begin := time.Now()
	if _, exit := exec(t, slow, "", "true"); exit.GetCode() != 0 || time.Since(begin) < 150*time.Millisecond {
		t.Errorf("a slow boot: %v after %s", exit, time.Since(begin))
	}
	select {
	case <-dying.Done():
		if dying.Exit().Kind != vmm.ExitCrash {
			t.Errorf("%+v", dying.Exit())
		}
	case <-time.After(20 * time.Second):
		t.Error("it does not die")
	}
}

func TestPowerButton(t *testing.T) {
	r := start(t, t.TempDir())
	if err := r.PowerButton(t.Context()); err != nil {
		t.Fatal(err)
	}
	select {
	case <-r.Done():
		if r.Exit().Kind != vmm.ExitPowerOff {
			t.Errorf("%+v", r.Exit())
		}
	case <-time.After(20 * time.Second):
		t.Error("it does not end")
	}
}

// TestStartIsCheap, because whole suites are made of fakes. What it takes of the processors is looked at: how long that is
// on the clock depends on who else wants them.
func TestStartIsCheap(t *testing.T) {
	before := used(t)
	for range 10 {
		if err := start(t, t.TempDir()).Stop(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	took := used(t) - before
	t.Logf("ten starts and stops: %s of a processor", took)
	if took > 3*time.Second {
		t.Errorf("ten starts and stops took %s of a processor", took)
	}
}

// used is the time of processors that this process and those it has waited for have had.
func used(t *testing.T) (sum time.Duration) {
	t.Helper()
	for _, who := range []int{syscall.RUSAGE_SELF, syscall.RUSAGE_CHILDREN} {
		var u syscall.Rusage
		if err := syscall.Getrusage(who, &u); err != nil {
			t.Fatal(err)
		}
		sum += time.Duration(u.Utime.Nano() + u.Stime.Nano())
	}
	return sum
}
