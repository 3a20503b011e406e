package artifact

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"pgregory.net/rapid"

	"banger/internal/fault"
)

type manifest struct {
	Name  string `json:"name"`
	Files []File `json:"files"`
}

func build(t *testing.T, s *Shelf, name, content string) manifest {
	t.Helper()
	var m manifest
	got, err := s.Build(func(dir string) (string, any, error) {
		if err := os.WriteFile(filepath.Join(dir, "data"), []byte(content), 0o600); err != nil {
			return "", nil, err
		}
		files, err := Describe(dir, "data")
		m = manifest{Name: name, Files: files}
		return name, m, err
	})
	if err != nil || got != name {
		t.Fatalf("built %q, error %v", got, err)
	}
	return m
}

func TestBuildAndCheck(t *testing.T) {
	s := Open(t.TempDir(), "image", "image.json")
	build(t, s, "one", "content")
	var m manifest
	if err := s.ReadManifest("one", &m); err != nil {
		t.Fatal(err)
	}
	if err := s.Check("one", m.Files); err != nil {
		t.Error(err)
	}
	if err := s.Verify(t.Context(), "one", m.Files); err != nil {
		t.Error(err)
	}
	build(t, s, "one", "other") // the same name again replaces
	if names, err := s.Names(); err != nil || len(names) != 1 {
		t.Errorf("names %v, error %v", names, err)
	}
	if left, _ := filepath.Glob(filepath.Join(s.dir, temporaryPrefix+"*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// While an artifact is replaced, there is always one of its name, so a kill at any moment leaves one.
func TestReplacingLeavesNoGap(t *testing.T) {
	s := Open(t.TempDir(), "image", "image.json")
	build(t, s, "one", "content")
	var gaps atomic.Int32
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			if _, err := os.Stat(filepath.Join(s.Dir("one"), "image.json")); err != nil {
				gaps.Add(1)
			}
		}
	})
	for i := range 100 {
		build(t, s, "one", strings.Repeat("x", i))
	}
	close(stop)
	wg.Wait()
	if n := gaps.Load(); n > 0 {
		t.Errorf("%d looks found nothing", n)
	}
	if info, err := os.Stat(filepath.Join(s.Dir("one"), "data")); err != nil || info.Size() != 99 {
		t.Errorf("%v, %v", info, err)
	}
}

func TestDamageIsFound(t *testing.T) {
	damages := map[string]func(path string) error{
		"removed":   os.Remove,
		"truncated": func(path string) error { return os.Truncate(path, 3) },
		"changed":   func(path string) error { return os.WriteFile(path, []byte("CONTENT"), 0o600) },
	}
	for what, damage := range damages {
		s := Open(t.TempDir(), "image", "image.json")
		m := build(t, s, "one", "content")
		path := filepath.Join(s.Dir("one"), "data")
		if err := damage(path); err != nil {
			t.Fatal(err)
		}
		err := s.Check("one", m.Files)
		if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "data") || !strings.Contains(fault.HintOf(err), "setup --rebuild") {
			t.Errorf("%s: %v (hint %q)", what, err, fault.HintOf(err))
		}
	}
}

func TestTouchedFileIsStillGood(t *testing.T) {
	s := Open(t.TempDir(), "image", "image.json")
	m := build(t, s, "one", "content")
	path := filepath.Join(s.Dir("one"), "data")
	info, err := os.Stat(path)
	if err != nil {
		t.Fatal(err)
	}
	later := info.ModTime().Add(1e9)
	if err := os.Chtimes(path, later, later); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := s.Check("one", m.Files); err != nil {
			t.Error(err)
		}
	}
	if len(s.verified) != 1 {
		t.Errorf("%d files remembered", len(s.verified))
	}
}

func TestBrokenManifest(t *testing.T) {
	s := Open(t.TempDir(), "kernel", "kernel.json")
	build(t, s, "one", "content")
	for _, content := range []string{"", "{", `{"files": 7}`} {
		if err := os.WriteFile(filepath.Join(s.Dir("one"), "kernel.json"), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		var m manifest
		if err := s.ReadManifest("one", &m); fault.KindOf(err) != fault.Precondition {
			t.Errorf("manifest %q: %v", content, err)
		}
	}
}

func TestFailedAndKilledBuilds(t *testing.T) {
	s := Open(t.TempDir(), "image", "image.json")
	broken := errors.New("broken")
	_, err := s.Build(func(dir string) (string, any, error) {
		// What a killed build leaves is removed by the next one; one at work is left alone.
		if left, _ := filepath.Glob(filepath.Join(s.dir, temporaryPrefix+"*")); len(left) != 1 {
			t.Errorf("at work: %v", left)
		}
		build(t, s, "other", "content")
		if _, err := os.Stat(dir); err != nil {
			t.Errorf("a second build at the same time removed the first: %v", err)
		}
		return "", nil, broken
	})
	if !errors.Is(err, broken) {
		t.Errorf("error %v", err)
	}
	if err := os.MkdirAll(filepath.Join(s.dir, temporaryPrefix+"dead", "sub"), 0o700); err != nil {
		t.Fatal(err)
	}
	build(t, s, "one", "content")
	if left, _ := filepath.Glob(filepath.Join(s.dir, temporaryPrefix+"*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestDeleteAndRename(t *testing.T) {
	s := Open(t.TempDir(), "image", "image.json")
	build(t, s, "one", "content")
	build(t, s, "two", "content")
	inUse := errors.New("in use")
	used, unused := func() error { return inUse }, func() error { return nil }
	moved := false
	look := func() error { moved = moved || !s.Has("one"); return inUse }
	if err := s.Delete("one", look); !errors.Is(err, inUse) || !s.Has("one") || moved {
		t.Errorf("one in use: %v; it was moved: %v", err, moved)
	}
	late := func() error { // somebody came to need it since we asked
		if s.Has("one") {
			return nil
		}
		return inUse
	}
	if err := s.Delete("one", late); !errors.Is(err, inUse) || !s.Has("one") {
		t.Errorf("one in use by now: %v", err)
	}
	if err := s.Rename("one", "three", manifest{}, used); !errors.Is(err, inUse) || !s.Has("one") || s.Has("three") {
		t.Errorf("one in use: %v", err)
	}
	if err := s.Rename("one", "two", manifest{}, unused); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a name that is taken: %v", err)
	}
	if err := s.Rename("one", "three", manifest{Name: "new"}, unused); err != nil {
		t.Fatal(err)
	}
	var m manifest
	if err := s.ReadManifest("three", &m); err != nil || m.Name != "new" || s.Has("one") {
		t.Errorf("manifest %+v, error %v", m, err)
	}
	if err := s.Delete("three", unused); err != nil || s.Has("three") {
		t.Errorf("error %v", err)
	}
	if err := s.Delete("three", unused); fault.KindOf(err) != fault.NotFound {
		t.Errorf("deleted twice: %v", err)
	}
}

// TestReconcileTellsWhatMends: by how the artifact was made.
func TestReconcileTellsWhatMends(t *testing.T) {
	for content, want := range map[string]string{
		`{"name": "one"}`:                               "banger setup --rebuild",
		`{"name": "one", "source": "alpine:3.20"}`:      "banger image import alpine:3.20",
		`{"name": "one", "build": {"recipe": "small"}}`: "banger image build small",
		`torn`: "banger setup --rebuild",
	} {
		s := Open(t.TempDir(), "image", "image.json")
		build(t, s, "one", "content")
		if err := errors.Join(s.SetDefault("one"), os.WriteFile(filepath.Join(s.Dir("one"), "image.json"), []byte(content), 0o600)); err != nil {
			t.Fatal(err)
		}
		told := s.Reconcile(s.Present)
		if len(told) != 1 || !strings.Contains(told[0], "not mended") || !strings.Contains(told[0], want) {
			t.Errorf("%s: %q", content, told)
		}
	}
}

func TestDefault(t *testing.T) {
	s := Open(t.TempDir(), "image", "image.json")
	if name, err := s.Default(); name != "" || err != nil {
		t.Errorf("default %q, error %v", name, err)
	}
	if err := s.Missing(""); !strings.Contains(err.Error(), "no image yet") {
		t.Errorf("with no images: %v", err)
	}
	build(t, s, "one", "content")
	if err := s.Missing(""); !strings.Contains(err.Error(), "no default image") || !strings.Contains(fault.HintOf(err), "banger image default one") {
		t.Errorf("with one: %v, hint %q", err, fault.HintOf(err))
	}
	if err := s.SetDefault("one"); err != nil {
		t.Fatal(err)
	}
	if name, err := s.Default(); name != "one" || err != nil {
		t.Errorf("default %q, error %v", name, err)
	}
	if names, _ := s.Names(); len(names) != 1 {
		t.Errorf("names %v", names)
	}
}

// TestSparseSum: the same content has the same sum, wherever its holes are; another has another.
func TestSparseSum(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		content := make([]byte, rapid.IntRange(0, 64<<10).Draw(rt, "size"))
		for range rapid.IntRange(0, 3).Draw(rt, "writes") {
			if len(content) > 0 {
				content[rapid.IntRange(0, len(content)-1).Draw(rt, "at")] = rapid.Byte().Draw(rt, "byte")
			}
		}
		dense, sparse := filepath.Join(dir, "dense"), filepath.Join(dir, "sparse")
		if err := os.WriteFile(dense, content, 0o600); err != nil {
			rt.Fatal(err)
		}
		writeSparse(rt, sparse, content)
		a, _, err := SparseSum(dense)
		b, size, err2 := SparseSum(sparse)
		if err != nil || err2 != nil || a != b || size != int64(len(content)) {
			rt.Fatalf("sums %s and %s, size %d, errors %v, %v", a, b, size, err, err2)
		}
		described, err := Describe(dir, "dense", "sparse")
		if err != nil || described[0].SHA256 != described[1].SHA256 || described[0].Sparse != described[1].Sparse {
			rt.Fatalf("%+v, %v", described, err)
		}
		content = append(content, 0)
		if len(content) > 1 {
			content[rapid.IntRange(0, len(content)-2).Draw(rt, "flip")] ^= 0x40
		}
		writeSparse(rt, sparse, content)
		if c, _, _ := SparseSum(sparse); c == a {
			rt.Fatal("another content has the same sum")
		}
	})
}

func writeSparse(t *rapid.T, path string, content []byte) {
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for at, b := range content {
		if b != 0 {
			if _, err := f.WriteAt([]byte{b}, int64(at)); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := f.Truncate(int64(len(content))); err != nil {
		t.Fatal(err)
	}
}
