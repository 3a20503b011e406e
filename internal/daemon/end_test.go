package daemon

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/build"
	"banger/internal/client"
	"banger/internal/fault"
)

// creating begins a create that pauses after its network stage, and returns its outcome.
func (p place) creating(t *testing.T, ctx context.Context) <-chan error {
	t.Helper()
	c := p.dial(t, pauseVariable+"=create/network")
	reached := make(chan struct{})
	outcome := make(chan error, 1)
	go func() {
		_, err := c.Create(ctx, spec("web"), func(e *bangerv1.Progress) {
			if e.GetStage() == "network" && e.GetStatus() == bangerv1.Progress_STATUS_DONE {
				close(reached)
			}
		})
		outcome <- err
	}()
	select {
	case <-reached:
	case <-time.After(20 * time.Second):
		t.Fatal("the create does not get to its network")
	}
	return outcome
}

// nothing fails unless no VM, process or directory is left.
func (p place) nothing(t *testing.T, c *client.Client) {
	t.Helper()
	p.sound(t, c)
	if res, err := c.VMs.ListVMs(t.Context(), &bangerv1.ListVMsRequest{}); err != nil || len(res.GetVms()) > 0 {
		t.Errorf("left: %v, %v", res.GetVms(), err)
	}
}

func TestInterruptedCreateLeavesNothing(t *testing.T) {
	p := newPlace(t)
	ctx, interrupt := context.WithCancel(t.Context())
	outcome := p.creating(t, ctx)
	interrupt()
	if err := <-outcome; fault.KindOf(err) != fault.Interrupted {
		t.Errorf("got %v", err)
	}
	p.nothing(t, p.dial(t)) // at once: Create returns after the rollback
}

func TestEndOfTheDaemonDuringCreateLeavesNothing(t *testing.T) {
	p := newPlace(t)
	outcome := p.creating(t, t.Context())
	p.end(t, syscall.SIGTERM)
	if err := <-outcome; err == nil {
		t.Error("the create succeeded")
	}
	if left := p.machines(t); len(left) > 0 {
		t.Errorf("machines %v are left", left)
	}
	p.nothing(t, p.dial(t))
}

// bangerd returns the command that is the test binary as bangerd.
func (p place) bangerd(args ...string) (*exec.Cmd, *bytes.Buffer) {
	o := p.options()
	cmd := exec.Command(o.Command[0], args...)
	var out bytes.Buffer
	cmd.Env, cmd.Stdout, cmd.Stderr = o.Env, &out, &out
	return cmd, &out
}

func TestExitCodes(t *testing.T) {
	p := newPlace(t)
	first, _ := p.bangerd()
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		if _, err := client.Dial(t.Context(), client.Options{Paths: p.Paths}); err == nil {
			break
		}
	}
	for _, test := range []struct {
		args []string
		code int
		says string
	}{
		{[]string{"--version"}, 0, "bangerd " + build.ID()},
		{[]string{"--help"}, 0, "usage: bangerd"},
		{[]string{"--loud"}, 2, `bangerd: error: unknown argument "--loud"`},
	} {
		cmd, out := p.bangerd(test.args...)
		_ = cmd.Run() // its code is looked at below
		if cmd.ProcessState.ExitCode() != test.code || !strings.Contains(out.String(), test.says) {
			t.Errorf("bangerd %q: code %d, %q", test.args, cmd.ProcessState.ExitCode(), out)
		}
	}
	if code := report(&bytes.Buffer{}, Run(t.Context(), Options{Paths: p.Paths, FakeVMM: true})); code != int(fault.Conflict) {
		t.Errorf("a second daemon ends with code %d", code)
	}
	if err := first.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := first.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v", err)
	}
}

// A service manager hears when the socket is there, and when the daemon is about to end.
func TestServiceManager(t *testing.T) {
	p := newPlace(t)
	manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(p.root, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer manager.Close()
	hear := func() string {
		t.Helper()
		if err := manager.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 4096)
		n, err := manager.Read(b)
		if err != nil {
			t.Fatal(err)
		}
		return string(b[:n])
	}
	cmd, out := p.bangerd()
	cmd.Env = append(cmd.Env, "NOTIFY_SOCKET="+manager.LocalAddr().String())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill() })
	if got := hear(); !strings.HasPrefix(got, "READY=1\nSTATUS=") {
		t.Errorf("first %q", got)
	}
	c, err := client.Dial(t.Context(), client.Options{Paths: p.Paths})
	if err != nil {
		t.Fatalf("it said that it is ready: %v", err)
	}
	c.Close()
	if got := hear(); got != "STATUS=serving" {
		t.Errorf("then %q", got)
	}
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if got := hear(); got != "STOPPING=1" {
		t.Errorf("at last %q", got)
	}
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	// One that a command starts says nothing to the manager that waits for the command.
	p.dial(t, "NOTIFY_SOCKET="+manager.LocalAddr().String())
	if err := manager.SetReadDeadline(time.Now().Add(50 * time.Millisecond)); err != nil { // it would be here already
		t.Fatal(err)
	}
	if n, err := manager.Read(make([]byte, 4096)); err == nil {
		t.Errorf("%d bytes from a daemon that no manager started", n)
	}
}

func TestRebind(t *testing.T) {
	p := newPlace(t)
	logger := slog.New(slog.DiscardHandler)
	old, err := listen(p.Socket(), logger)
	if err != nil {
		t.Fatal(err)
	}
	if same := rebind(old, nil, logger); same != old {
		t.Error("bound again although the socket is there")
	}
	if err := os.Remove(p.Socket()); err != nil {
		t.Fatal(err)
	}
	accepting := make(chan *listener, 1)
	fresh := rebind(old, func(l *listener) { accepting <- l }, logger)
	if fresh == old || <-accepting != fresh || !fresh.present() {
		t.Fatal("not bound again")
	}
	if info, err := os.Stat(p.Socket()); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the new socket: %v, %v", info.Mode(), err)
	}
	if _, err := old.Accept(); err == nil {
		t.Error("the old listener still accepts")
	}
	if err := fresh.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(p.Socket()); !errors.Is(err, os.ErrNotExist) {
		t.Error("the socket is left")
	}
}
