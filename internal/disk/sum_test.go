package disk

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// A sum is of what is read from a file, not of how it is kept; and a bit that flips makes another one.
func TestSum(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		size := rapid.IntRange(0, 3*sumBlock+100).Draw(t, "size")
		text := make([]byte, size)
		for range rapid.IntRange(0, 3).Draw(t, "bytes") {
			if size > 0 {
				text[rapid.IntRange(0, size-1).Draw(t, "at")] = rapid.Byte().Draw(t, "byte")
			}
		}
		full, sparse := filepath.Join(dir, "full"), filepath.Join(dir, "sparse")
		if err := errors.Join(os.WriteFile(full, text, 0o600), os.WriteFile(sparse, text, 0o600), Dig(context.Background(), sparse)); err != nil {
			t.Fatal(err)
		}
		sum := func(path string) uint32 {
			n, err := Sum(context.Background(), path)
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
		if a, b := sum(full), sum(sparse); a != b {
			t.Fatalf("full %08x, sparse %08x", a, b)
		}
		before := sum(full)
		if size > 0 {
			text[rapid.IntRange(0, size-1).Draw(t, "flipped")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
		} else {
			text = []byte{0}
		}
		if err := os.WriteFile(full, text, 0o600); err != nil {
			t.Fatal(err)
		}
		if sum(full) == before {
			t.Fatal("a change was not seen")
		}
	})
}

func TestMarkTellsOfWritesWhoseTimeIsSetBack(t *testing.T) {
	path := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(path, []byte("a"), 0o600); err != nil {
		t.Fatal(err)
	}
	when := time.Unix(1000, 0)
	mark := func() Mark {
		if err := os.Chtimes(path, when, when); err != nil {
			t.Fatal(err)
		}
		m, err := MarkOf(path)
		if err != nil {
			t.Fatal(err)
		}
		return m
	}
	before := mark()
	after := mark()
	for range 1000 { // the clock of times of change may be a coarse one
		if after != before {
			break
		}
		time.Sleep(time.Millisecond)
		if err := os.WriteFile(path, []byte("b"), 0o600); err != nil {
			t.Fatal(err)
		}
		after = mark()
	}
	if after == before || after.Modified != before.Modified {
		t.Errorf("before %+v, after %+v", before, after)
	}
	if _, err := MarkOf(path + ".gone"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a file that is gone: %v", err)
	}
}
