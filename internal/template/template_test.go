package template

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/vmm"
)

var (
	shape = Shape{Image: "debian", ImageDigest: "sha256:1", VMM: "qemu", CPUs: 2, MemoryBytes: 512 << 20, MaskedUnits: []string{"a"}}
	noon  = time.Date(2026, 1, 2, 12, 0, 0, 0, time.UTC)
)

// made makes a template of a shape in s, with a log that is not to stay.
func made(t *testing.T, s *Store, shape Shape, at time.Time) Template {
	t.Helper()
	m, err := s.Begin(shape)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := m.Abandon(); err != nil {
			t.Error(err)
		}
	}()
	fill(t, m.Dir, append(slices.Clone(required), "overlay.ext4", "serial.log")...)
	made, err := m.Commit(t.Context(), at, "overlay.ext4")
	if err != nil {
		t.Fatal(err)
	}
	return made
}

func fill(t *testing.T, dir string, names ...string) {
	t.Helper()
	for _, name := range names {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func names(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// Every field of the shape is part of the key: a new one cannot be forgotten.
func TestEveryFieldMakesAnotherKey(t *testing.T) {
	keys := map[string]string{Shape{}.Key(): "nothing"}
	typ := reflect.TypeFor[Shape]()
	for i := range typ.NumField() {
		name := typ.Field(i).Name
		if name == "Format" { // a constant, whatever the caller says
			continue
		}
		var s Shape
		switch f := reflect.ValueOf(&s).Elem().Field(i); f.Kind() {
		case reflect.String:
			f.SetString("x")
		case reflect.Int, reflect.Int64:
			f.SetInt(7)
		case reflect.Slice:
			f.Set(reflect.ValueOf([]string{"x"}))
		default:
			t.Fatalf("field %s: say here what another value of %s is", name, f.Kind())
		}
		if other, ok := keys[s.Key()]; ok {
			t.Errorf("%s and %s have the key %s", name, other, s.Key())
		}
		keys[s.Key()] = name
	}
	if !keyPattern.MatchString(shape.Key()) {
		t.Errorf("key %q", shape.Key())
	}
}

func TestLifeOfATemplate(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "templates"))
	if all, err := s.List(); len(all) > 0 || err != nil {
		t.Fatalf("before the first: %v, %v", all, err)
	}
	first := made(t, s, shape, noon)
	want := []string{ManifestFile, "machine.json", "memory", "overlay.ext4", "state"}
	slices.Sort(want)
	got := names(t, first.Dir)
	slices.Sort(got)
	if !slices.Equal(got, want) {
		t.Errorf("holds %v, want %v", got, want)
	}
	read, err := s.Get(shape.Key())
	if err != nil || read.SizeBytes == 0 || read.Uses != 0 || !read.CreatedAt.Equal(noon) || read.Shape.Image != "debian" {
		t.Fatalf("%+v, %v", read, err)
	}
	for range 2 {
		if err := s.Used(shape.Key(), noon.Add(time.Hour)); err != nil {
			t.Fatal(err)
		}
	}
	all, err := s.List()
	if err != nil || len(all) != 1 || all[0].Uses != 2 || !all[0].LastUsedAt.Equal(noon.Add(time.Hour)) || all[0].Problem != "" {
		t.Fatalf("%+v, %v", all, err)
	}
	if key, err := s.Find(shape.Key()[:4]); err != nil || key != shape.Key() {
		t.Errorf("%s, %v", key, err)
	}
	for _, bad := range []string{"", "zz", "../" + shape.Key()} {
		if _, err := s.Find(bad); fault.KindOf(err) != fault.NotFound {
			t.Errorf("%q: %v", bad, err)
		}
		if err := s.Delete(bad); fault.KindOf(err) != fault.NotFound {
			t.Errorf("delete %q: %v", bad, err)
		}
	}
	if err := s.Delete(shape.Key()); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(shape.Key()); fault.KindOf(err) != fault.NotFound {
		t.Errorf("after delete: %v", err)
	}
	if err := s.Used(shape.Key(), noon); err != nil {
		t.Errorf("a use of what is gone: %v", err)
	}
	if left := names(t, s.dir); !slices.Equal(left, []string{lockFile}) {
		t.Errorf("left: %v", left)
	}
}

func TestDamage(t *testing.T) {
	for what, harm := range map[string]func(dir string) error{
		"no memory": func(d string) error { return os.Remove(filepath.Join(d, vmm.SavedMemory)) },
		"longer state": func(d string) error {
			return os.WriteFile(filepath.Join(d, vmm.SavedState), []byte("long and longer"), 0o600)
		},
		"touched disk":   func(d string) error { return os.Chtimes(filepath.Join(d, "overlay.ext4"), noon, noon) },
		"no manifest":    func(d string) error { return os.Remove(filepath.Join(d, ManifestFile)) },
		"empty manifest": func(d string) error { return os.Truncate(filepath.Join(d, ManifestFile), 0) },
		"of another": func(d string) error {
			return os.WriteFile(filepath.Join(d, ManifestFile), []byte(`{"key":"0123456789abcdef"}`), 0o600)
		},
		"a link": func(d string) error {
			return errors.Join(os.Rename(filepath.Join(d, "state"), filepath.Join(d, "x")), os.Symlink("x", filepath.Join(d, "state")))
		},
	} {
		t.Run(what, func(t *testing.T) {
			s := Open(t.TempDir())
			if err := harm(made(t, s, shape, noon).Dir); err != nil {
				t.Fatal(err)
			}
			if _, err := s.Get(shape.Key()); fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
				t.Errorf("got %v", err)
			}
			all, err := s.List()
			if err != nil || len(all) != 1 || all[0].Problem == "" || all[0].Key != shape.Key() {
				t.Errorf("listed as %+v, %v", all, err)
			}
			if made(t, s, shape, noon); err != nil { // a new one takes its place
				t.Fatal(err)
			}
			if _, err := s.Get(shape.Key()); err != nil {
				t.Error(err)
			}
		})
	}
}

// flip changes one bit of a file and sets its time back.
func flip(t *testing.T, path string) {
	t.Helper()
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	text[len(text)/2] ^= 4
	if err := errors.Join(os.WriteFile(path, text, 0o600), os.Chtimes(path, info.ModTime(), info.ModTime())); err != nil {
		t.Fatal(err)
	}
}

// A bit that flips is found by the next who looks, whatever the file's time says; bits that stay are read once.
func TestVerify(t *testing.T) {
	for _, name := range append(slices.Clone(required), "overlay.ext4") {
		for _, used := range []bool{false, true} {
			s := Open(t.TempDir())
			one := made(t, s, shape, noon)
			if used {
				if err := s.Verify(t.Context(), one); err != nil {
					t.Fatal(err)
				}
			}
			flip(t, filepath.Join(one.Dir, name))
			one, err := s.Get(shape.Key())
			if err != nil {
				t.Fatalf("%s: its time tells: %v", name, err)
			}
			if err := s.Verify(t.Context(), one); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), name) || fault.HintOf(err) == "" {
				t.Errorf("%s, used before %v: %v", name, used, err)
			}
		}
	}
}

func TestVerifyReadsLargeFilesOnce(t *testing.T) {
	s := Open(t.TempDir())
	one := made(t, s, shape, noon)
	large := filepath.Join(one.Dir, "memory")
	if err := os.Truncate(large, 2*smallFile); err != nil {
		t.Fatal(err)
	}
	sum, err := disk.Sum(t.Context(), large)
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(one.Files, func(f File) bool { return f.Name == "memory" })
	one.Files[i].Size, one.Files[i].CRC32C = 2*smallFile, sum
	if err := s.Verify(t.Context(), one); err != nil {
		t.Fatal(err)
	}
	one.Files[i].CRC32C++ // as if it were damaged: nobody reads it
	if err := s.Verify(t.Context(), one); err != nil {
		t.Errorf("read again: %v", err)
	}
	flip(t, large)
	one.Files[i].CRC32C--
	if err := s.Verify(t.Context(), one); fault.KindOf(err) != fault.Precondition {
		t.Errorf("after a change: %v", err)
	}
	if err := s.Delete(one.Key); err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(t.Context(), one); fault.KindOf(err) != fault.NotFound || len(s.marks) > 0 {
		t.Errorf("after it is gone: %v, remembered %v", err, s.marks)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Verify(ctx, made(t, s, shape, noon)); !errors.Is(err, context.Canceled) {
		t.Errorf("given up: %v", err)
	}
}

func TestAHarmlessLoss(t *testing.T) {
	s := Open(t.TempDir())
	dir := made(t, s, shape, noon).Dir
	if err := os.WriteFile(filepath.Join(dir, useFile), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if got, err := s.Get(shape.Key()); err != nil || got.Uses != 0 {
		t.Errorf("%+v, %v", got, err)
	}
	if err := s.Used(shape.Key(), noon); err != nil {
		t.Error(err)
	}
}

func TestOneMakerAtATime(t *testing.T) {
	dir := t.TempDir()
	first, err := Open(dir).Begin(shape)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir).Begin(Shape{Image: "other"}); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a second one: %v", err)
	}
	never := func(Leftover) error { t.Error("touched while somebody works on it"); return nil }
	if left, err := Open(dir).Leftovers(never); len(left) > 0 || err != nil {
		t.Errorf("%v, %v", left, err)
	}
	if err := first.Abandon(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(first.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("abandoned, but there: %v", err)
	}
	made(t, Open(dir), shape, noon)
}

func TestCommitOfHalfATemplate(t *testing.T) {
	s := Open(t.TempDir())
	m, err := s.Begin(shape)
	if err != nil {
		t.Fatal(err)
	}
	fill(t, m.Dir, vmm.SavedState)
	if _, err := m.Commit(t.Context(), noon); err == nil {
		t.Error("no memory, no driver's manifest, and no complaint")
	}
	if err := m.Abandon(); err != nil {
		t.Fatal(err)
	}
	if all, _ := s.List(); len(all) > 0 {
		t.Errorf("%+v", all)
	}
}

func TestLeftovers(t *testing.T) {
	s := Open(t.TempDir())
	made(t, s, shape, noon)
	for _, name := range []string{makingPrefix + "0123456789abcdef", makingPrefix + "fedcba9876543210", goingPrefix + "0123456789abcdef"} {
		if err := os.Mkdir(filepath.Join(s.dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	stuck := errors.New("it does not end")
	found, err := s.Leftovers(func(l Leftover) error {
		if l.Key == "fedcba9876543210" {
			return stuck
		}
		return nil
	})
	if len(found) != 1 || found[0].Key != "0123456789abcdef" || !errors.Is(err, stuck) {
		t.Errorf("%v, %v", found, err)
	}
	want := []string{lockFile, makingPrefix + "fedcba9876543210", shape.Key()}
	if left := names(t, s.dir); !slices.Equal(left, want) {
		t.Errorf("left %v, want %v", left, want)
	}
}

func TestVictims(t *testing.T) {
	day := 24 * time.Hour
	at := func(key string, size int64, created, used time.Duration) Template {
		t := Template{Manifest: Manifest{Key: key, SizeBytes: size, CreatedAt: noon.Add(-created)}}
		if used > 0 {
			t.LastUsedAt = noon.Add(-used)
		}
		return t
	}
	all := []Template{at("old-unused", 1, 40*day, 0), at("old-used", 2, 40*day, day), at("new", 4, 2*day, 0), at("newest", 8, time.Hour, 0)}
	for _, c := range []struct {
		budget int64
		keep   string
		want   []string
	}{
		{100, "", []string{"old-unused"}},
		{100, "old-unused", nil},
		{14, "", []string{"old-unused"}},
		{13, "", []string{"old-unused", "new"}},
		{9, "", []string{"old-unused", "new", "old-used"}},
		{9, "new", []string{"old-unused", "old-used"}},
		{0, "", []string{"old-unused", "new", "old-used"}}, // the newest stays, or it would be made again
	} {
		if got := victims(all, noon, 30*day, c.budget, map[string]bool{c.keep: true}); !slices.Equal(got, c.want) {
			t.Errorf("budget %d, keep %q: %v, want %v", c.budget, c.keep, got, c.want)
		}
	}
}

func TestAllAreOldOneDay(t *testing.T) {
	all := []Template{{Manifest: Manifest{Key: "a", CreatedAt: noon}}, {Manifest: Manifest{Key: "b", CreatedAt: noon.Add(time.Hour)}}}
	if got := victims(all, noon.Add(48*time.Hour), 24*time.Hour, 1, nil); !slices.Equal(got, []string{"a", "b"}) {
		t.Errorf("%v", got)
	}
}

func TestEvict(t *testing.T) {
	s := Open(t.TempDir())
	one := made(t, s, shape, noon)
	two := made(t, s, Shape{Image: "other"}, noon.Add(time.Hour))
	gone, err := s.Evict(noon.Add(2*time.Hour), 24*time.Hour, two.SizeBytes, nil)
	if err != nil || !slices.Equal(gone, []string{one.Key}) {
		t.Errorf("%v, %v", gone, err)
	}
	if all, _ := s.List(); len(all) != 1 || all[0].Key != two.Key {
		t.Errorf("left %+v", all)
	}
}

func FuzzManifest(f *testing.F) {
	f.Add([]byte(`{"key":"x","files":[{"name":"../../etc/passwd"}]}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s := Open(t.TempDir())
		dir := s.Dir(shape.Key())
		if err := errors.Join(os.Mkdir(dir, 0o700), os.WriteFile(filepath.Join(dir, ManifestFile), text, 0o600)); err != nil {
			t.Fatal(err)
		}
		if _, err := s.Get(shape.Key()); err == nil {
			t.Error("a template without memory is taken")
		}
	})
}
