package vm

import (
	"math"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"banger/internal/fault"
)

func TestCheckName(t *testing.T) {
	for _, good := range []string{"a", "web", "build-2", "a1", strings.Repeat("a", 63), "facade", "deadbeef2"} {
		if err := CheckName(good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	bad := []string{
		"", "-a", "a-", "A", "Web", "1a", "a_b", "a.b", "a b", "ä", "web\n", "\x00", "../x", strings.Repeat("a", 64), strings.Repeat("x", 100000),
		"localhost", "vm", "deadbeef", "00000000",
	}
	for _, name := range bad {
		err := CheckName(name)
		if fault.KindOf(err) != fault.Usage || fault.HintOf(err) == "" {
			t.Errorf("%.20q: %v", name, err)
		}
		if err != nil && len(err.Error()) > 300 {
			t.Errorf("%.20q fills the screen with %d bytes", name, len(err.Error()))
		}
	}
}

// A name that passes is safe wherever it is used.
func TestNamesAreLabels(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.String().Draw(t, "name")
		if CheckName(name) != nil {
			return
		}
		for _, r := range name {
			if !strings.ContainsRune("abcdefghijklmnopqrstuvwxyz0123456789-", r) {
				t.Fatalf("%q passed", name)
			}
		}
		if IsID(name) {
			t.Fatalf("%q could be an id", name)
		}
	})
}

func TestNewIDIsAnID(t *testing.T) {
	seen := map[ID]bool{}
	for range 1000 {
		id := NewID()
		if !IsID(string(id)) || seen[id] {
			t.Fatalf("bad or repeated id %q", id)
		}
		seen[id] = true
	}
}

func good() Spec {
	return Spec{Name: "web", VMM: "auto", CPUs: 2, MemoryBytes: 1 << 30, DiskBytes: 4 << 30, WorkDiskBytes: 4 << 30, Units: UnitsFast}
}

var limits = Limits{CPUs: 4, MemoryBytes: 8 << 30, VMMs: []string{"fake", "qemu"}}

func TestValidate(t *testing.T) {
	if err := good().Validate(limits); err != nil {
		t.Fatal(err)
	}
	bad := map[string]func(*Spec){
		"no name":         func(s *Spec) { s.Name = "" },
		"no cpu":          func(s *Spec) { s.CPUs = 0 },
		"negative cpus":   func(s *Spec) { s.CPUs = -1 },
		"too many cpus":   func(s *Spec) { s.CPUs = 5 },
		"little memory":   func(s *Spec) { s.MemoryBytes = 127 << 20 },
		"much memory":     func(s *Spec) { s.MemoryBytes = 9 << 30 },
		"odd memory":      func(s *Spec) { s.MemoryBytes = 1<<30 + 1 },
		"little disk":     func(s *Spec) { s.DiskBytes = 1 << 20 },
		"negative disk":   func(s *Spec) { s.DiskBytes = math.MinInt64 },
		"huge disk":       func(s *Spec) { s.DiskBytes = math.MaxInt64 },
		"odd disk":        func(s *Spec) { s.DiskBytes = 4<<30 + 1 },
		"little work":     func(s *Spec) { s.WorkDiskBytes = 0 },
		"unknown vmm":     func(s *Spec) { s.VMM = "vbox" },
		"no vmm":          func(s *Spec) { s.VMM = "" },
		"unknown units":   func(s *Spec) { s.Units = "some" },
		"image path":      func(s *Spec) { s.Image = "../etc" },
		"hidden kernel":   func(s *Spec) { s.Kernel = ".x" },
		"key of two":      func(s *Spec) { s.AuthorizedKeys = []string{"a b\nc d"} },
		"key of one word": func(s *Spec) { s.AuthorizedKeys = []string{"a"} },
		"slow disk":       func(s *Spec) { s.DiskRate = MinRate - 1 },
		"negative rate":   func(s *Spec) { s.NetRate = -1 },
		"endless rate":    func(s *Spec) { s.NetRate = math.MaxInt64 },
		"many keys":       func(s *Spec) { s.AuthorizedKeys = make([]string, MaxAuthorizedKeys+1) },
	}
	for name, spoil := range bad {
		s := good()
		spoil(&s)
		err := s.Validate(limits)
		if fault.KindOf(err) != fault.Usage {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestParseSize(t *testing.T) {
	for in, want := range map[string]int64{
		"4G": 4 << 30, "512M": 512 << 20, "1073741824": 1 << 30, "1.5GiB": 3 << 29, " 2g ": 2 << 30, "64MB": 64 << 20, "0": 0, "1T": 1 << 40,
	} {
		if got, err := ParseSize(in); err != nil || got != want {
			t.Errorf("%q = %d, %v; want %d", in, got, err, want)
		}
	}
	for _, in := range []string{"", "G", "4X", "-1G", "four", "1 2", "NaN", "Inf", "0x10", "1e400"} {
		if n, err := ParseSize(in); fault.KindOf(err) != fault.Usage || !strings.Contains(fault.HintOf(err), "4G") {
			t.Errorf("%q = %d, %v", in, n, err)
		}
	}
}

func FuzzParseSize(f *testing.F) {
	for _, s := range []string{"4G", "9999999999999999999999", "9E", "1..2", "99999999999P", "-", "٣G", "8388608T"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		n, err := ParseSize(s)
		if n < 0 || err != nil && (n != 0 || fault.KindOf(err) != fault.Usage) {
			t.Errorf("%q = %d, %v", s, n, err)
		}
	})
}
