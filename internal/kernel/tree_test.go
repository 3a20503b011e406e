package kernel

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

// Modules on a file system of their own are taken without what e2fsck may have put there, which only root may read.
func TestModulesOnTheirOwnFileSystem(t *testing.T) {
	dir := t.TempDir()
	for _, name := range []string{"lost+found", "kernel/lost+found"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	for _, name := range []string{"modules.dep", "kernel/a.ko"} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(filepath.Join(dir, "lost+found"), 0); err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	if err := tarTree(&out, dir); err != nil {
		t.Fatal(err)
	}
	var names []string
	for r := tar.NewReader(&out); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		names = append(names, h.Name)
	}
	if want := []string{"./", "kernel/", "kernel/a.ko", "kernel/lost+found/", "modules.dep"}; !slices.Equal(names, want) {
		t.Errorf("%q, want %q", names, want)
	}
}
