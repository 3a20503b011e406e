package snapshot

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/fault"
)

// keep makes a snapshot with one file.
func keep(t *testing.T, s Store, tag string) Snapshot {
	t.Helper()
	dir, err := s.Make(tag)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "work.ext4"), []byte("disk"), 0o600); err != nil {
		t.Fatal(err)
	}
	made, err := s.Keep(t.Context(), dir, Manifest{Tag: tag, Kind: Disk})
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func TestWholeOrNotAtAll(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "snapshots"), "web")
	if all, err := s.List(); err != nil || len(all) > 0 {
		t.Fatalf("%v, %v", all, err)
	}
	one := keep(t, s, "v1")
	if one.ApparentBytes != 4 || one.Files["work.ext4"] != 4 {
		t.Errorf("%+v", one)
	}
	if _, err := s.Make("v2"); err != nil { // its maker dies
		t.Fatal(err)
	}
	if all, err := s.List(); err != nil || len(all) != 1 {
		t.Errorf("%v, %v", all, err)
	}
	if err := s.Sweep(); err != nil {
		t.Error(err)
	}
	if left, err := os.ReadDir(filepath.Dir(one.Dir)); err != nil || len(left) != 1 {
		t.Errorf("%v, %v", left, err)
	}
	if err := s.CheckNew("v1"); fault.KindOf(err) != fault.Conflict {
		t.Error(err)
	}
	if err := s.Delete("v1"); err != nil {
		t.Error(err)
	}
	for _, err := range []error{s.Delete("v1"), func() error { _, err := s.Get("v1"); return err }()} {
		if fault.KindOf(err) != fault.NotFound {
			t.Error(err)
		}
	}
}

func TestDamage(t *testing.T) {
	for what, harm := range map[string]func(dir string) error{
		"a file is gone":  func(dir string) error { return os.Remove(filepath.Join(dir, "work.ext4")) },
		"a file is short": func(dir string) error { return os.Truncate(filepath.Join(dir, "work.ext4"), 1) },
		"no manifest":     func(dir string) error { return os.Remove(filepath.Join(dir, ManifestFile)) },
		"half a manifest": func(dir string) error { return os.Truncate(filepath.Join(dir, ManifestFile), 10) },
		"of another": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, ManifestFile), []byte(`{"tag":"x"}`), 0o600)
		},
		"a file from beyond": func(dir string) error {
			return os.WriteFile(filepath.Join(dir, ManifestFile), []byte(`{"tag":"v1","files":{"../x":1}}`), 0o600)
		},
	} {
		s := Open(t.TempDir(), "web")
		if err := harm(keep(t, s, "v1").Dir); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get("v1"); fault.KindOf(err) != fault.Precondition {
			t.Errorf("%s: %v", what, err)
		}
		if all, err := s.List(); err != nil || len(all) != 1 || all[0].Problem == "" || all[0].Tag != "v1" {
			t.Errorf("%s: %+v, %v", what, all, err)
		}
	}
}

// A bit of the memory that flips is found before anybody goes back to it, whatever the file's time says.
func TestDamagedMemory(t *testing.T) {
	s := Open(t.TempDir(), "web")
	dir, err := s.Make("v1")
	if err == nil {
		err = errors.Join(os.Mkdir(filepath.Join(dir, MemoryDir), 0o700), os.WriteFile(filepath.Join(dir, MemoryDir, "state"), []byte("memory"), 0o600))
	}
	if err != nil {
		t.Fatal(err)
	}
	one, err := s.Keep(t.Context(), dir, Manifest{Tag: "v1", Kind: Memory})
	if err == nil {
		err = one.CheckMemory(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(one.Dir, MemoryDir, "state")
	info, err := os.Stat(path)
	if err == nil {
		err = errors.Join(os.WriteFile(path, []byte("mem0ry"), 0o600), os.Chtimes(path, info.ModTime(), info.ModTime()))
	}
	if err != nil {
		t.Fatal(err)
	}
	if one, err = s.Get("v1"); err != nil {
		t.Fatal(err)
	}
	if err := one.CheckMemory(t.Context()); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "memory/state") {
		t.Errorf("got %v", err)
	}
}

func TestFreeTag(t *testing.T) {
	s := Open(t.TempDir(), "web")
	at := time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)
	for _, want := range []string{"20260301-120000", "20260301-120000-2", "20260301-120000-3"} {
		tag, err := s.FreeTag(at)
		if err != nil || tag != want {
			t.Errorf("%s, %v; want %s", tag, err, want)
		}
		keep(t, s, tag)
	}
}

func TestCheckText(t *testing.T) {
	if err := CheckText("a note\nof two lines", map[string]string{"by": "ci", "empty": ""}); err != nil {
		t.Error(err)
	}
	many := map[string]string{}
	for i := range maxLabels + 1 {
		many[strings.Repeat("x", i%50+1)+string(rune('a'+i/50))] = ""
	}
	for name, err := range map[string]error{
		"long note":   CheckText(strings.Repeat("x", maxNote+1), nil),
		"escape":      CheckText("\x1b[2J", nil),
		"not UTF-8":   CheckText("\xff", nil),
		"no key":      CheckText("", map[string]string{"": "x"}),
		"line break":  CheckText("", map[string]string{"a": "x\ny"}),
		"long text":   CheckText("", map[string]string{"a": strings.Repeat("x", maxLabelText+1)}),
		"many labels": CheckText("", many),
	} {
		if fault.KindOf(err) != fault.Usage {
			t.Errorf("%s: %v", name, err)
		}
	}
}
