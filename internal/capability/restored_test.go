package capability

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/internal/artifact"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/vm"
)

// A guest that goes on from its memory gets the same machine, and no initramfs.
func TestRestoredGuestNeedsNoInitramfs(t *testing.T) {
	f := newFixture(t)
	v := f.vm(t, "0000000a", "web")
	booted, err := f.up(t.Context(), &v)
	if err != nil {
		t.Fatal(err)
	}
	if err := f.down(t.Context(), v); err != nil {
		t.Fatal(err)
	}
	f.shelf.base = "/nowhere" // nothing of it is asked for
	b := f.build(v)
	b.Restored = true
	for _, c := range f.all {
		if _, err := c.Up(t.Context(), v, b); err != nil {
			t.Fatalf("%s: %v", c.Name(), err)
		}
	}
	if _, err := os.Stat(filepath.Join(b.Machine.Dir, paths.VMInitramfs)); err == nil || b.Machine.Initramfs != "" {
		t.Errorf("there is an initramfs, %q", b.Machine.Initramfs)
	}
	if len(b.Machine.Disks) != len(booted.Machine.Disks) || b.Machine.NICs[0] != booted.Machine.NICs[0] || b.Guest.GetMachineId() != booted.Guest.GetMachineId() {
		t.Errorf("another machine: %+v, was %+v", b.Machine, booted.Machine)
	}
}

// What the memory holds parts of must be what it was.
func TestRestoredGuestWantsItsImageAndKernel(t *testing.T) {
	for what, change := range map[string]func(*shelf){
		"image": func(s *shelf) {
			img := s.images["debian-1"]
			img.Digest = "sha256:2"
			s.images["debian-1"] = img
		},
		"kernel": func(s *shelf) {
			s.kernel.Manifest.Files = []artifact.File{{Name: "modules.ext4", SHA256: "another"}}
		},
	} {
		f := newFixture(t)
		v := f.vm(t, "0000000a", "web")
		if _, err := f.up(t.Context(), &v); err != nil {
			t.Fatal(err)
		}
		change(f.shelf)
		b := f.build(v)
		b.Restored = true
		var err error
		for _, c := range f.all {
			if _, err = c.Up(t.Context(), v, b); err != nil {
				break
			}
		}
		if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TAP devices of VMs that come and go are in use.
func TestSweepSparesThoseOnTheirWay(t *testing.T) {
	f := newFixture(t)
	var all []vm.VM
	if _, err := f.net.EnsureBridge(t.Context()); err != nil {
		t.Fatal(err)
	}
	for id, state := range map[vm.ID]vm.State{"0000000a": vm.Suspending, "0000000b": vm.Resuming, "0000000c": vm.Suspended} {
		v := f.vm(t, id, "web-"+string(id))
		v.State = state
		f.net.Leave(paths.TAP(id)) // of a banger that had no pool
		v.Notes[networkName] = Note(`{"tap":"` + paths.TAP(id) + `"}`)
		all = append(all, v)
	}
	var n *network
	for _, c := range f.all {
		if x, ok := c.(*network); ok {
			n = x
		}
	}
	told, err := n.Sweep(t.Context(), all)
	if err != nil || len(told) != 1 || !strings.Contains(told[0], paths.TAP("0000000c")) {
		t.Errorf("swept %q, %v", told, err)
	}
}
