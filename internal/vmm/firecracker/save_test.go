package firecracker

import (
	"os"
	"path/filepath"
	"syscall"
	"testing"
)

// What a Firecracker that somebody has taken over leaves in place of a snapshot leads nowhere.
func TestOnlyPlainFilesAreMoved(t *testing.T) {
	dir := t.TempDir()
	secret := filepath.Join(dir, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o640); err != nil {
		t.Fatal(err)
	}
	for name, put := range map[string]func(string) error{
		"link":      func(path string) error { return os.Symlink(secret, path) },
		"FIFO":      func(path string) error { return syscall.Mkfifo(path, 0o600) },
		"directory": func(path string) error { return os.Mkdir(path, 0o700) },
	} {
		from, to := filepath.Join(dir, name), filepath.Join(dir, "to")
		if err := put(from); err != nil {
			t.Fatal(err)
		}
		if err := move(t.Context(), from, to); err == nil {
			t.Errorf("a %s was moved", name)
		}
		if _, err := os.Lstat(to); err == nil {
			t.Errorf("a %s is there", name)
		}
	}
	if info, err := os.Stat(secret); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("what the link leads to became %v, %v", info, err)
	}
}
