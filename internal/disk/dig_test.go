package disk

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestDig(t *testing.T) {
	path := filepath.Join(t.TempDir(), "memory")
	content := make([]byte, 4<<20+123)
	for _, at := range []int{0, 1 << 20, 1<<20 + 70000, len(content) - 1} {
		content[at] = 7
	}
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := Dig(t.Context(), path); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || !bytes.Equal(got, content) {
			t.Fatalf("the file reads differently: %v", err)
		}
	}
	allocated, err := AllocatedBytes(path)
	if err != nil || allocated > 4*digBlock {
		t.Errorf("%d bytes are on the disk, %v", allocated, err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Dig(ctx, path); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
	if err := Dig(t.Context(), path+".none"); !os.IsNotExist(err) {
		t.Errorf("no file: %v", err)
	}
}
