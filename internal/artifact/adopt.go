package artifact

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"time"

	"banger/internal/fault"
)

// ready is what every manifest tells, of whatever kind.
type ready struct {
	Name         string `json:"name"`
	Architecture string `json:"architecture"`
	Files        []File `json:"files"`
}

var adoptable = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+~-]{0,99}$`)

// Adopt takes an artifact that lies ready in the directory from, its manifest with it, onto the shelf under its own name. clone
// copies one file. What is on the shelf already, whole and the same, is left alone; another content under that name is a Conflict
// fault, and files that are not what the manifest says a Precondition fault.
func (s *Shelf) Adopt(ctx context.Context, from string, clone func(ctx context.Context, dst, src string) error) (string, error) {
	other := Open(filepath.Dir(from), s.kind, s.manifest)
	var text json.RawMessage
	var m ready
	err := other.ReadManifest(filepath.Base(from), &text)
	if err == nil {
		err = other.ReadManifest(filepath.Base(from), &m)
	}
	if err == nil {
		err = m.check(s.kind)
	}
	if err != nil {
		return "", fault.Wrap(fault.KindOf(err), err, "%s", from)
	}
	if s.Has(m.Name) {
		var have ready
		if s.ReadManifest(m.Name, &have) == nil && !slices.EqualFunc(have.Files, m.Files, sameContent) {
			return "", fault.New(fault.Conflict, "there is a %s %q already, with another content", s.kind, m.Name).
				WithHint("delete that one: banger %s delete %s", s.kind, m.Name)
		}
		if s.Check(m.Name, have.Files) == nil && len(have.Files) > 0 {
			return m.Name, nil
		}
	}
	return s.Build(func(dir string) (string, any, error) {
		for _, f := range m.Files {
			if err := f.adopt(ctx, dir, from, clone); err != nil {
				return "", nil, err
			}
		}
		return m.Name, text, nil
	})
}

func (m ready) check(kind string) error {
	if !adoptable.MatchString(m.Name) || m.Name == defaultName {
		return fault.New(fault.Precondition, "%q is no name of a %s", m.Name, kind)
	}
	if m.Architecture != runtime.GOARCH {
		return fault.New(fault.Precondition, "%s %s is for %s, this machine is %s", kind, m.Name, m.Architecture, runtime.GOARCH)
	}
	if len(m.Files) == 0 {
		return fault.New(fault.Precondition, "%s %s has no files", kind, m.Name)
	}
	for _, f := range m.Files {
		if f.Name != filepath.Base(f.Name) || !filepath.IsLocal(f.Name) || f.Name == "." {
			return fault.New(fault.Precondition, "%s %s has a file %q, which is not inside of its directory", kind, m.Name, f.Name)
		}
	}
	return nil
}

func sameContent(a, b File) bool {
	a.ModTime, b.ModTime = 0, 0
	return a == b
}

// adopt copies one file, compares it, and gives it the time that the manifest tells, so that it need not be summed again.
func (f File) adopt(ctx context.Context, dir, from string, clone func(ctx context.Context, dst, src string) error) error {
	path := filepath.Join(dir, f.Name)
	if err := clone(ctx, path, filepath.Join(from, f.Name)); err != nil {
		return err
	}
	sum, size, err := sumLike(path, f.Sparse)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot read what was copied")
	}
	if sum != f.SHA256 || size != f.Size {
		return fault.New(fault.Precondition, "%s is not what its manifest says", filepath.Join(from, f.Name)).
			WithHint("see what else is wrong: banger runtime verify")
	}
	then := time.Unix(0, f.ModTime)
	if err := os.Chtimes(path, then, then); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot set the time of %s", path)
	}
	return nil
}
