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
	"banger/internal/paths"
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

// act is one call of a client.
type act struct {
	operation string
	needs     []string // operations before it
	do        func(*testing.T, *client.Client) error
}

// life is what a VM goes through.
var life = []act{
	{"create", nil, func(t *testing.T, c *client.Client) error {
		_, err := c.Create(t.Context(), spec("web"), nil)
		return err
	}},
	{"suspend", []string{"create"}, func(t *testing.T, c *client.Client) error {
		_, err := c.Suspend(t.Context(), &bangerv1.SuspendVMRequest{Vm: "web"}, nil)
		return err
	}},
	{"resume", []string{"create", "suspend"}, func(t *testing.T, c *client.Client) error {
		_, err := c.Start(t.Context(), &bangerv1.StartVMRequest{Vm: "web", Resume: true}, nil)
		return err
	}},
	{"snapshot", []string{"create"}, func(t *testing.T, c *client.Client) error {
		_, err := c.CreateSnapshot(t.Context(), &bangerv1.CreateSnapshotRequest{Vm: "web", Tag: "v1"}, nil)
		return err
	}},
	{"restore", []string{"create", "snapshot"}, func(t *testing.T, c *client.Client) error {
		_, err := c.RestoreSnapshot(t.Context(), &bangerv1.RestoreSnapshotRequest{Vm: "web", Tag: "v1", Running: true}, nil)
		return err
	}},
	{"fork", []string{"create"}, func(t *testing.T, c *client.Client) error {
		_, err := c.Fork(t.Context(), &bangerv1.ForkVMRequest{Vm: "web", Name: "kid", Count: 2}, nil)
		return err
	}},
	{"stop", []string{"create"}, func(t *testing.T, c *client.Client) error {
		_, err := c.Stop(t.Context(), &bangerv1.StopVMRequest{Vm: "web"}, nil)
		return err
	}},
	{"clone", []string{"create", "stop"}, func(t *testing.T, c *client.Client) error {
		_, err := c.Clone(t.Context(), &bangerv1.CloneVMRequest{Vm: "web", Name: "twin"}, nil)
		return err
	}},
	{"start", []string{"create", "stop"}, func(t *testing.T, c *client.Client) error {
		_, err := c.Start(t.Context(), &bangerv1.StartVMRequest{Vm: "web"}, nil)
		return err
	}},
	{"delete", []string{"create"}, func(t *testing.T, c *client.Client) error { return remove(t, c, "web") }},
}

func remove(t *testing.T, c *client.Client, name string) error {
	return c.Delete(t.Context(), &bangerv1.DeleteVMRequest{Vm: name, Force: true}, nil)
}

// trace lives one VM's life and returns the stages it went through, each once.
func (p place) trace(t *testing.T) []string {
	t.Helper()
	file := filepath.Join(p.root, "trace")
	c := p.dial(t, traceVariable+"="+file)
	for _, a := range life {
		if err := a.do(t, c); err != nil {
			t.Fatalf("%s: %v", a.operation, err)
		}
	}
	p.empty(t, c)
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

// empty deletes all VMs.
func (p place) empty(t *testing.T, c *client.Client) {
	t.Helper()
	res, err := c.VMs.ListVMs(t.Context(), &bangerv1.ListVMsRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range res.GetVms() {
		if err := remove(t, c, v.GetName()); err != nil {
			t.Fatal(err)
		}
	}
}

// killedAt does what leads to the stage, in a daemon that dies there, and looks at what the next daemon makes of it.
func (p place) killedAt(t *testing.T, at string) {
	operation, _, _ := strings.Cut(at, "/")
	c := p.dial(t, killVariable+"="+at)
	defer c.Close()
	doomed := p.daemon(t)
	last := life[slices.IndexFunc(life, func(a act) bool { return a.operation == operation })]
	for _, a := range life {
		if !slices.Contains(last.needs, a.operation) {
			continue
		}
		if err := a.do(t, c); err != nil {
			t.Fatalf("%s: %v", a.operation, err)
		}
	}
	err := last.do(t, c)
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
	p.empty(t, c)
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
		case "stopped", "failed", "suspended":
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
	for _, half := range []string{paths.SuspendedNew, paths.RevertNew, paths.Forked, paths.Snapshots + "/.*"} {
		if left, _ := filepath.Glob(filepath.Join(p.VMs(), "*", half)); len(left) > 0 {
			t.Errorf("half made is %v", left)
		}
	}
}

// settled lists the VMs once none of them is on its way: the next daemon finishes a stop in the
// background, since a guest may take its time.
func settled(t *testing.T, c *client.Client) *bangerv1.ListVMsResponse {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		res, err := c.VMs.ListVMs(t.Context(), &bangerv1.ListVMsRequest{})
		if err != nil {
			t.Fatal(err)
		}
		stopping := func(v *bangerv1.VM) bool { return v.GetState() == "stopping" }
		if !slices.ContainsFunc(res.GetVms(), stopping) {
			return res
		}
	}
	t.Fatal("a VM is still being stopped")
	return nil
}

// awaitMachines wants just these processes. One that was told to end may need a moment.
func awaitMachines(t *testing.T, p place, want []int) {
	t.Helper()
	slices.Sort(want)
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		got := p.machines(t)
		slices.Sort(got)
		if slices.Equal(got, want) {
			return
		}
	}
	t.Errorf("machines %v run, rows know of %v", p.machines(t), want)
}
