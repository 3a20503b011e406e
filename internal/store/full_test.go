package store

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
	"banger/internal/vm"
)

// On a full disk the states of VMs are still written, so that they can be stopped and deleted: that makes room.
func TestFullDiskLetsRowsGo(t *testing.T) {
	need.Root(t)
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=16m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	s, err := Open(t.Context(), filepath.Join(dir, "banger.db"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.Close() })
	var rows []vm.VM
	for i := range 20 {
		v, err := s.Insert(t.Context(), sample(fmt.Sprintf("web-%d", i)), next)
		if err != nil {
			t.Fatal(err)
		}
		rows = append(rows, v)
	}
	filler, err := os.Create(filepath.Join(dir, "filler"))
	if err != nil {
		t.Fatal(err)
	}
	defer filler.Close()
	for block := make([]byte, 4096); err == nil; {
		_, err = filler.Write(block)
	}
	for range 40 { // more often than there is room for without beginning the log anew
		for _, v := range rows {
			v.State = vm.Stopping
			if err := s.Save(t.Context(), v); err != nil {
				t.Fatalf("a row on a full disk: %v", err)
			}
		}
	}
	for _, v := range rows {
		if err := s.Delete(t.Context(), v.ID); err != nil {
			t.Fatalf("delete %s on a full disk: %v", v.Spec.Name, err)
		}
	}
	if _, err := s.Get(t.Context(), string(rows[0].ID)); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a row that was deleted: %v", err)
	}
}
