package artifact

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"banger/internal/fault"
)

func copyFile(_ context.Context, dst, src string) error {
	content, err := os.ReadFile(src)
	if err != nil {
		return err
	}
	return os.WriteFile(dst, content, 0o600)
}

// readyIn puts a whole artifact into a directory and returns that.
func readyIn(t *testing.T, name, content string) string {
	t.Helper()
	from := Open(t.TempDir(), "image", "image.json")
	_, err := from.Build(func(dir string) (string, any, error) {
		if err := os.WriteFile(filepath.Join(dir, "data"), []byte(content), 0o600); err != nil {
			return "", nil, err
		}
		files, err := Describe(dir, "data")
		return "ready", map[string]any{"name": name, "architecture": runtime.GOARCH, "files": files, "more": 7}, err
	})
	if err != nil {
		t.Fatal(err)
	}
	return from.Dir("ready")
}

func TestAdopt(t *testing.T) {
	s := Open(t.TempDir(), "image", "image.json")
	from := readyIn(t, "one", "content")
	for range 2 { // the second time it is there
		if name, err := s.Adopt(t.Context(), from, copyFile); err != nil || name != "one" {
			t.Fatalf("%q, %v", name, err)
		}
	}
	var m struct {
		Files []File
		More  int
	}
	if err := s.ReadManifest("one", &m); err != nil || m.More != 7 {
		t.Errorf("%+v, %v", m, err)
	}
	if err := s.Check("one", m.Files); err != nil || len(s.verified) > 0 {
		t.Errorf("%v; %d files had to be summed", err, len(s.verified))
	}
	path := filepath.Join(s.Dir("one"), "data")
	if err := os.WriteFile(path, []byte("damaged"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Adopt(t.Context(), from, copyFile); err != nil {
		t.Error(err)
	}
	if content, err := os.ReadFile(path); err != nil || string(content) != "content" {
		t.Errorf("not mended: %q, %v", content, err)
	}
	if _, err := s.Adopt(t.Context(), readyIn(t, "one", "another"), copyFile); fault.KindOf(err) != fault.Conflict {
		t.Errorf("another content of that name: %v", err)
	}
}

func TestAdoptRefuses(t *testing.T) {
	cases := map[string]func(m map[string]any, dir string) error{
		"another machine": func(m map[string]any, _ string) error { m["architecture"] = "vax"; return nil },
		"a path":          func(m map[string]any, _ string) error { m["name"] = "../one"; return nil },
		"the default":     func(m map[string]any, _ string) error { m["name"] = "default"; return nil },
		"no files":        func(m map[string]any, _ string) error { m["files"] = nil; return nil },
		"a file outside": func(m map[string]any, _ string) error {
			m["files"] = []File{{Name: "../../../etc/hostname"}}
			return nil
		},
		"changed": func(_ map[string]any, dir string) error {
			return os.WriteFile(filepath.Join(dir, "data"), []byte("CONTENT"), 0o600)
		},
	}
	for what, change := range cases {
		from := readyIn(t, "one", "content")
		m := map[string]any{}
		path := filepath.Join(from, "image.json")
		text, err := os.ReadFile(path)
		if err == nil {
			err = json.Unmarshal(text, &m)
		}
		if err == nil {
			err = change(m, from)
		}
		if err == nil {
			text, err = json.Marshal(m)
		}
		if err == nil {
			err = os.WriteFile(path, text, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		s := Open(t.TempDir(), "image", "image.json")
		_, err = s.Adopt(t.Context(), from, copyFile)
		if names, _ := s.Names(); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), filepath.Dir(from)) || len(names) > 0 {
			t.Errorf("%s: %v; there is %q", what, err, names)
		}
	}
}
