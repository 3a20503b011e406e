package fctest

import (
	"bytes"
	"debug/elf"
	"testing"
)

// TestGuests: kernels that VMMs take, each with its words in it.
func TestGuests(t *testing.T) {
	seen := map[string]bool{}
	for _, kernel := range [][]byte{Kernel(), Guest(Count), Guest(Reset), Guest(Halt), Guest(Panic), Guest(TripleFault)} {
		f, err := elf.NewFile(bytes.NewReader(kernel))
		if err != nil {
			t.Fatal(err)
		}
		if f.Machine != elf.EM_X86_64 || f.Type != elf.ET_EXEC || len(f.Progs) != 1 {
			t.Fatalf("%+v", f)
		}
		p := f.Progs[0]
		code := make([]byte, p.Filesz)
		if _, err := p.ReadAt(code, 0); err != nil {
			t.Fatal(err)
		}
		if f.Entry != p.Paddr || p.Paddr < 1<<20 || p.Flags&elf.PF_X == 0 {
			t.Errorf("entry %#x, segment %+v", f.Entry, p.ProgHeader)
		}
		if seen[string(code)] {
			t.Error("two guests are the same")
		}
		seen[string(code)] = true
	}
}

// TestJumps: what is jumped to is where it is meant to be.
func TestJumps(t *testing.T) {
	var c code
	c.emit(0x90, 0x75)
	c.near(0)
	if want := []byte{0x90, 0x75, 0xfd}; !bytes.Equal(c, want) { // three bytes back, from the end of the jump
		t.Errorf("% x, want % x", []byte(c), want)
	}
}
