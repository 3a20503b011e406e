package image

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"banger/internal/hosttest/need"
)

// TestSweep: what a dead build left goes, with the program that is still at work for it; one at work stays.
func TestSweep(t *testing.T) {
	need.Binary(t, "mmdebstrap")
	t.Setenv("TMPDIR", t.TempDir())
	s := Open(filepath.Join(t.TempDir(), "images"))
	if err := s.Sweep(t.Context()); err != nil {
		t.Fatalf("nothing there yet: %v", err)
	}
	half := s.shelf.Dir(".new-1")
	left, busy := filepath.Join(os.TempDir(), scratchPrefix+"left"), filepath.Join(os.TempDir(), scratchPrefix+"busy")
	for _, dir := range []string{half, left, busy} {
		if err := os.MkdirAll(filepath.Join(dir, "deep"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	other := &scratch{dir: busy}
	if err := other.take(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = other.lock.Close() }()
	begin := func(dir string) *exec.Cmd {
		cmd := exec.Command("sleep", "1000")
		cmd.Env = append(os.Environ(), "TMPDIR="+dir)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		})
		return cmd
	}
	stray, working := begin(left), begin(busy)
	if err := s.Sweep(t.Context()); err != nil {
		t.Fatal(err)
	}
	for dir, stays := range map[string]bool{half: false, left: false, busy: true} {
		if _, err := os.Stat(dir); errors.Is(err, os.ErrNotExist) == stays {
			t.Errorf("%s stays: %v", dir, !stays)
		}
	}
	_ = stray.Wait() // a sleep that was not killed would take 1000 s
	if status, ok := stray.ProcessState.Sys().(syscall.WaitStatus); !ok || status.Signal() != syscall.SIGKILL {
		t.Errorf("the stray program: %v", stray.ProcessState)
	}
	if err := working.Process.Signal(syscall.Signal(0)); err != nil {
		t.Errorf("the program at work: %v", err)
	}
}
