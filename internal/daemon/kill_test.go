package daemon

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

// TestKilledAtEachStage kills the daemon after each stage of each operation. The next daemon must
// leave no process, directory or row that nobody owns, and VMs that ran must still answer.
func TestKilledAtEachStage(t *testing.T) {
	p := newPlace(t)
	stages := p.trace(t)
	if len(stages) < 20 {
		t.Fatalf("only %d stages: %q", len(stages), stages)
	}
	for _, at := range stages {
		t.Run(at, func(t *testing.T) { p.killedAt(t, at) })
	}
}

// trace lives one VM's life and returns the stages it went through, each once.
func (p place) trace(t *testing.T) []string {
	t.Helper()
	file := filepath.Join(p.root, "trace")
	c := p.dial(t, traceVariable+"="+file)
	p.create(t, c, "web")
	for _, step := range []func() error{
		func() error { return stop(t, c) }, func() error { return start(t, c) },
		func() error { return stop(t, c) }, func() error { return remove(t, c) },
	} {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	p.end(t, syscall.SIGTERM)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	var stages []string
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if !slices.Contains(stages, line) && !strings.HasPrefix(line, "reconcile/") {
			stages = append(stages, line)
		}
	}
	return stages
}

func start(t *testing.T, c *client.Client) error {
	_, err := c.Start(t.Context(), &bangerv1.StartVMRequest{Vm: "web"}, nil)
	return err
}

func stop(t *testing.T, c *client.Client) error {
	_, err := c.Stop(t.Context(), &bangerv1.StopVMRequest{Vm: "web"}, nil)
	return err
}

func remove(t *testing.T, c *client.Client) error {
	return c.Delete(t.Context(), &bangerv1.DeleteVMRequest{Vm: "web", Force: true}, nil)
}

// killedAt does what leads to the stage, in a daemon that dies there, and looks at what the next daemon makes of it.
func (p place) killedAt(t *testing.T, at string) {
	operation, _, _ := strings.Cut(at, "/")
	c := p.dial(t, killVariable+"="+at)
	defer c.Close()
	doomed := p.daemon(t)
	_, err := c.Create(t.Context(), spec("web"), nil)
	if operation != "create" {
		if err != nil {
			t.Fatal(err)
		}
		act := map[string]func() error{
			"stop":   func() error { return stop(t, c) },
			"start":  func() error { _ = stop(t, c); return start(t, c) },
			"delete": func() error { _ = stop(t, c); return remove(t, c) },
		}[operation]
		if act == nil {
			t.Fatalf("unknown operation %s", operation)
		}
		err = act()
	}
	if err == nil {
		t.Error("the call succeeded although the daemon died")
	}
	awaitDone(t, doomed)
	if err != nil && (fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" || !strings.Contains(err.Error(), " VM web")) {
		t.Errorf("the client said: %v (hint %q)", err, fault.HintOf(err))
	}

	c = p.dial(t)
	defer c.Close()
	p.sound(t, c)
	if res, err := c.VMs.ListVMs(t.Context(), &bangerv1.ListVMsRequest{}); err == nil && len(res.GetVms()) > 0 {
		if err := remove(t, c); err != nil {
			t.Fatal(err)
		}
	}
	if left := p.machines(t); len(left) > 0 {
		t.Errorf("machines %v run for nobody", left)
	}
	p.end(t, syscall.SIGTERM)
}

// sound fails when processes, directories and rows do not belong together.
func (p place) sound(t *testing.T, c *client.Client) {
	t.Helper()
	res := settled(t, c)
	var pids []int
	var ids []string
	for _, v := range res.GetVms() {
		ids = append(ids, v.GetId())
		switch v.GetState() {
		case "running":
			pids = append(pids, int(v.GetPid()))
			if out, code := execute(t, c, v.GetId(), "echo", "hello"); out != "hello\n" || code != 0 {
				t.Errorf("VM %s does not answer", v.GetName())
			}
		case "stopped", "failed":
		default:
			t.Errorf("VM %s is left %s", v.GetName(), v.GetState())
		}
	}
	awaitMachines(t, p, pids)
	entries, err := os.ReadDir(p.VMs())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if !slices.Contains(ids, e.Name()) {
			t.Errorf("directory %s is nobody's", e.Name())
		}
	}
	if len(entries) != len(ids) {
		t.Errorf("%d VMs have %d directories", len(ids), len(entries))
	}
}

// settled lists the VMs once none of them is on its way: the next daemon finishes a stop in the
// background, since a guest may take its time.
func settled(t *testing.T, c *client.Client) *bangerv1.ListVMsResponse {
	t.Helper()
	for range 100 {
		res, err := c.VMs.ListVMs(t.Context(), &bangerv1.ListVMsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		stopping := func(v *bangerv1.VM) bool { return v.GetState() == "stopping" }
		if !slices.ContainsFunc(res.GetVms(), stopping) {
			return res
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("a VM is still being stopped")
	return nil
}

// awaitMachines wants just these processes. One that was told to end may need a moment.
func awaitMachines(t *testing.T, p place, want []int) {
	t.Helper()
	slices.Sort(want)
	for range 20 {
		got := p.machines(t)
		slices.Sort(got)
		if slices.Equal(got, want) {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("machines %v run, rows know of %v", p.machines(t), want)
}
