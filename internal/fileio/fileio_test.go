package fileio

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"banger/internal/fault"
)

func TestUntil(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	r := Until(ctx, strings.NewReader("abcdef"))
	b := make([]byte, 3)
	if n, err := r.Read(b); err != nil || string(b[:n]) != "abc" {
		t.Errorf("got %q, %v", b[:n], err)
	}
	cancel()
	if n, err := r.Read(b); n != 0 || !errors.Is(err, context.Canceled) {
		t.Errorf("after its end: got %d bytes, %v", n, err)
	}
	all, err := io.ReadAll(Until(t.Context(), strings.NewReader("abc")))
	if err != nil || string(all) != "abc" {
		t.Errorf("got %q, %v", all, err)
	}
}

func TestPlain(t *testing.T) {
	dir := t.TempDir()
	file, pipe := filepath.Join(dir, "file"), filepath.Join(dir, "pipe")
	if err := errors.Join(os.WriteFile(file, []byte("abc"), 0o600), syscall.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	if info, err := Plain(file); err != nil || info.Size() != 3 {
		t.Errorf("a file: %v, %v", info, err)
	}
	for path, want := range map[string]fault.Kind{
		pipe: fault.Usage, dir: fault.Usage, os.DevNull: fault.Usage, filepath.Join(dir, "none"): fault.NotFound, filepath.Join(file, "below"): fault.Precondition,
	} {
		if _, err := Plain(path); fault.KindOf(err) != want {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestFlush(t *testing.T) {
	dir := t.TempDir()
	for _, path := range []string{"a/b/file", "a/other"} {
		path = filepath.Join(dir, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte("x"), 0o400)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("nowhere", filepath.Join(dir, "a/link")); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(Flush(filepath.Join(dir, "a/other")), Flush(dir), FlushTree(dir)); err != nil {
		t.Error(err)
	}
	missing := filepath.Join(dir, "missing")
	for _, err := range []error{Flush(missing), FlushTree(missing)} {
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("got %v", err)
		}
	}
}
