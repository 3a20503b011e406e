package engine

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// A bit of a suspended VM's memory that flips is told, whatever the file's time says; nothing of the VM is touched, and the
// way out that is offered is one.
func TestSuspendedMemoryThatIsDamaged(t *testing.T) {
	h := newHouse(t)
	v := h.create("web")
	memory := filepath.Join(h.p.VM(v.ID), paths.Suspended)
	for name, harm := range map[string]func(path string) error{
		vmm.SavedState:      func(path string) error { return rewrite(path, "", "") },
		vmm.SavedManifest:   func(path string) error { return rewrite(path, `"cpus"`, `"cpuz"`) },
		paths.SuspendedDisk: func(path string) error { return rewrite(path, "size_bytes", "size_bytez") },
	} {
		if _, err := h.Suspend(t.Context(), "web", nil); err != nil {
			t.Fatal(err)
		}
		if err := harm(filepath.Join(memory, name)); err != nil {
			t.Fatal(err)
		}
		_, err := h.Resume(t.Context(), "web", nil)
		if fault.KindOf(err) != fault.Precondition || !strings.Contains(fault.HintOf(err), "banger vm start web --cold") {
			t.Errorf("%s: %v, hint %q", name, err, fault.HintOf(err))
		}
		t.Logf("%s: %v", name, err)
		if v, err := h.Get(t.Context(), "web"); err != nil || v.State != vm.Suspended {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
		if _, err := h.Boot(t.Context(), "web", nil); err != nil {
			t.Errorf("%s: the way out: %v", name, err)
		}
	}
}

// A snapshot whose memory is damaged is not gone back to, and the VM runs on; its disks can be had.
func TestSnapshotWhoseMemoryIsDamaged(t *testing.T) {
	h := newHouse(t)
	v := h.create("web")
	boot := h.bootID("web")
	if _, err := h.CreateSnapshot(t.Context(), "web", SnapshotOptions{Tag: "v1"}, nil); err != nil {
		t.Fatal(err)
	}
	memory := filepath.Join(h.p.VM(v.ID), paths.Snapshots, "v1", "memory")
	if err := rewrite(filepath.Join(memory, vmm.SavedState), "", ""); err != nil {
		t.Fatal(err)
	}
	_, err := h.RestoreSnapshot(t.Context(), "web", "v1", RestoreOptions{Running: true}, nil)
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "memory/state") || !strings.Contains(fault.HintOf(err), "--disks-only") {
		t.Errorf("%v, hint %q", err, fault.HintOf(err))
	}
	if v, err := h.Get(t.Context(), "web"); err != nil || v.State != vm.Running || h.bootID("web") != boot {
		t.Errorf("it does not run on: %+v, %v", v, err)
	}
	if v, err := h.RestoreSnapshot(t.Context(), "web", "v1", RestoreOptions{Running: true, DisksOnly: true}, nil); err != nil || v.State != vm.Stopped {
		t.Errorf("the way out: %+v, %v", v, err)
	}
	if _, err := os.Stat(memory); errors.Is(err, os.ErrNotExist) {
		t.Error("the snapshot is gone")
	}
}

// What a guest could not do for a copy is passed on to the user, and nothing that would upset a terminal.
func TestWhatAGuestLacksIsTold(t *testing.T) {
	b := newBench(t)
	v := b.forkable("web")
	body := b.w.body(v.ID)
	b.w.mu.Lock()
	body.lacking = []string{"its file systems do not stand still: \x1b[2J\nbecause", "2", "3", "4", "5"}
	b.w.mu.Unlock()
	var told []string
	if _, err := b.CreateSnapshot(t.Context(), "web", SnapshotOptions{}, func(e progress.Event) {
		if e.Status == progress.Notice {
			told = append(told, e.Message)
		}
	}); err != nil {
		t.Fatal(err)
	}
	if len(told) != maxLacking || told[0] != "VM web: its file systems do not stand still: [2J because" {
		t.Errorf("told %q", told)
	}
}

// Who has a template made ahead gets one that is whole, also when there is one that only looks so.
func TestWarmMakesADamagedTemplateAnew(t *testing.T) {
	h := newTemplateHouse(t)
	first := h.warm()
	if again := h.warm(); !again.CreatedAt.Equal(first.CreatedAt) {
		t.Error("a whole one was made anew")
	}
	if err := rewrite(filepath.Join(first.Dir, vmm.SavedMemory), "", ""); err != nil {
		t.Fatal(err)
	}
	second := h.warm()
	if second.Key != first.Key || second.CreatedAt.Equal(first.CreatedAt) {
		t.Errorf("made at %s, and at %s", first.CreatedAt, second.CreatedAt)
	}
	if _, stages, notices := h.createTold(houseSpec("web")); !slices.Equal(stages, restoredStages) || len(notices) > 0 {
		t.Errorf("it went through %v, told %q", stages, notices)
	}
}
