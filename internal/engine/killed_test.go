package engine

import (
	"context"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"banger/internal/paths"
	"banger/internal/vm"
)

// machines returns the processes that work below a directory.
func machines(root string) []int {
	var pids []int
	cwds, _ := filepath.Glob("/proc/[0-9]*/cwd")
	for _, link := range cwds {
		if cwd, err := os.Readlink(link); err == nil && strings.HasPrefix(cwd, root) {
			if pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link))); err == nil {
				pids = append(pids, pid)
			}
		}
	}
	return pids
}

// saved are verbs on memory, each with what leads to it, and the stages of it after which there may be a machine.
var saved = map[string]struct {
	before func(*house)
	verb   func(context.Context, *house) error
	stages []string
}{
	"suspend": {
		func(h *house) { h.create("web") },
		func(ctx context.Context, h *house) error { _, err := h.Suspend(ctx, "web", nil); return err },
		[]string{stageCheck, stageRecord, stageQuiesce, stagePause, stageSave},
	},
	"resume": {
		func(h *house) {
			h.create("web")
			if _, err := h.Suspend(h.t.Context(), "web", nil); err != nil {
				h.t.Fatal(err)
			}
		},
		func(ctx context.Context, h *house) error { _, err := h.Resume(ctx, "web", nil); return err },
		[]string{stageMachine, stageLoad, stageIdentity, stageReady},
	},
	"snapshot": {
		func(h *house) { h.create("web") },
		func(ctx context.Context, h *house) error {
			_, err := h.CreateSnapshot(ctx, "web", SnapshotOptions{Tag: "v1"}, nil)
			return err
		},
		[]string{stageCheck, stageQuiesce, stageRecord, stagePause, stageSave, stageGoOn, stageClock, stageSeal, stageKeep},
	},
	"restore": {
		func(h *house) {
			h.create("web")
			if _, err := h.CreateSnapshot(h.t.Context(), "web", SnapshotOptions{Tag: "v1"}, nil); err != nil {
				h.t.Fatal(err)
			}
		},
		func(ctx context.Context, h *house) error {
			_, err := h.RestoreSnapshot(ctx, "web", "v1", RestoreOptions{Running: true}, nil)
			return err
		},
		[]string{stageCheck, stageCopy, stageRecord, stageMachine, stageLoad, stageIdentity, stageReady},
	},
	"fork": {
		func(h *house) { h.create("web") },
		func(ctx context.Context, h *house) error {
			_, err := h.Fork(ctx, "web", ForkOptions{Name: "kid", Count: 2}, nil)
			return err
		},
		[]string{
			stageCheck, stageRecord, stageQuiesce, stagePause, stageSave, stageGoOn, stageClock, stageSeal,
			stageCopy, stageMachine, stageLoad, stageIdentity, stageReady,
		},
	},
	"create": {
		func(h *house) { h.warm() },
		func(ctx context.Context, h *house) error {
			_, err := h.Create(ctx, houseSpec("web"), true, nil)
			return err
		},
		[]string{stageMachine, stageLoad, stageIdentity, stageReady},
	},
}

// All VMMs are killed after each stage of each verb. Whatever comes of it is told by rows that are true: no VM is
// left on its way, none runs without a process, nothing half made is left, and each VM starts again.
func TestVMMsKilledAtEachStage(t *testing.T) {
	for operation, v := range saved {
		for _, at := range v.stages {
			t.Run(operation+" "+at, func(t *testing.T) {
				t.Parallel()
				h := newTemplateHouse(t)
				v.before(h)
				var once sync.Once
				h.after(func(o, stage string) {
					if o == operation && stage == at {
						once.Do(h.killAll)
					}
				})
				err := v.verb(t.Context(), h)
				once.Do(func() { t.Error("there is no such stage") })
				h.settled(err)
			})
		}
	}
}

// killAll returns when they have ended.
func (h *house) killAll() {
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		all := machines(filepath.Dir(h.p.State))
		if len(all) == 0 {
			return
		}
		if time.Now().After(deadline) {
			h.t.Errorf("processes %v outlived SIGKILL", all)
			return
		}
		for _, pid := range all {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}

// settled waits until nobody works on a VM any more, and looks at all of them; err is the verb's.
func (h *house) settled(err error) {
	t := h.t
	t.Helper()
	at := func(s vm.State) bool { return s == vm.Stopped || s == vm.Failed || s == vm.Suspended }
	var rows []vm.VM
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(5 * time.Millisecond) {
		all, errList := h.List(t.Context())
		if errList != nil {
			t.Fatal(errList)
		}
		rows = all
		quiet := true
		for _, v := range rows {
			alive := v.Handle != nil && slices.Contains(machines(h.p.VM(v.ID)), pid(t, v))
			quiet = quiet && (at(v.State) || v.State == vm.Running && alive)
		}
		if quiet {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: rows %+v", err, rows)
		}
	}
	for _, v := range rows {
		for _, half := range []string{paths.SuspendedNew, paths.RevertNew, paths.Forked, paths.Snapshots + "/.*"} {
			if left, _ := filepath.Glob(filepath.Join(h.p.VM(v.ID), half)); len(left) > 0 {
				t.Errorf("%s: half made is %v", v.Spec.Name, left)
			}
		}
		if v.State == vm.Failed && v.Reason == "" {
			t.Errorf("%s has failed without a reason", v.Spec.Name)
		}
		if _, err := h.Start(t.Context(), v.Spec.Name, nil); err != nil {
			t.Errorf("start %s, which was %s (%s): %v", v.Spec.Name, v.State, v.Reason, err)
			continue
		}
		h.bootID(v.Spec.Name)
	}
	for _, v := range rows {
		if err := h.Delete(t.Context(), string(v.ID), true, nil); err != nil {
			t.Error(err)
		}
	}
	if left := machines(h.p.VMs()); len(left) > 0 { // elsewhere a template may be under way
		t.Errorf("processes %v are left", left)
	}
	if left, _ := filepath.Glob(filepath.Join(h.p.VMs(), "*")); len(left) > 0 {
		t.Errorf("left %v", left)
	}
}

// The VMM of a template that is being made is killed after each stage: there is no template, and nothing of it.
func TestVMMOfATemplateKilledAtEachStage(t *testing.T) {
	for _, at := range []string{stageMachine, stageBoot, stageAgent, stageQuiesce, stagePause} {
		t.Run(at, func(t *testing.T) {
			t.Parallel()
			h := newTemplateHouse(t)
			h.after(func(operation, stage string) {
				if operation == "template" && stage == at {
					h.killAll()
				}
			})
			if _, err := h.WarmTemplate(t.Context(), houseSpec("any"), nil); err == nil {
				t.Error("made of a dead machine")
			}
			h.after(nil)
			h.nothingButTemplates(t, 0)
			h.warm()
		})
	}
}
