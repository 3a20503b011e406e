// Package supply fills the runtime directory: it fetches bundles and Firecracker's releases, checks what is there, and packs
// bundles for other machines. A part is unpacked aside, into a directory with a name of its own; writing bundle.json is the one
// step that puts it into use, so that there is the old state or the new one at any moment.
package supply

import (
	"context"
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"github.com/gofrs/flock"
	"github.com/google/renameio/v2"

	"banger/internal/artifact"
	"banger/internal/bundle"
	"banger/internal/fault"
	"banger/internal/progress"
)

// Stages, as they are told.
const (
	stageDownload = "download"
	stageUnpack   = "unpack"
	stageVerify   = "verify"
	stagePack     = "pack"
)

const (
	lockName        = ".lock"
	temporaryPrefix = ".banger-new-"
)

// partPattern matches the directories that this package makes: what else lies there is somebody else's.
var partPattern = regexp.MustCompile(`^(bundle|firecracker)-[0-9a-z.]+-[0-9]+$`)

// Store is a runtime directory that is changed.
type Store struct {
	Dir       string // the runtime directory; made when it is not there
	Downloads string // where incomplete downloads are kept
	Sink      progress.Sink
}

// change holds the directory's lock while f works in a new directory beside the parts; what f returns is in use
// afterwards.
func (s *Store) change(f func(dir string) (change, error)) (b bundle.Bundle, err error) {
	if err := os.MkdirAll(s.Dir, 0o755); err != nil {
		return b, s.notWritable(err)
	}
	lock := flock.New(filepath.Join(s.Dir, lockName), flock.SetPermissions(0o644))
	switch held, err := lock.TryLock(); {
	case err != nil:
		return b, s.notWritable(err)
	case !held:
		return b, fault.New(fault.Conflict, "another banger changes %s right now", s.Dir).WithHint("wait until that is done")
	}
	defer func() { err = errors.Join(err, lock.Close()) }()
	s.removeLeftovers()
	old, err := s.current()
	if err != nil {
		return b, err
	}
	dir, err := os.MkdirTemp(s.Dir, temporaryPrefix)
	if err != nil {
		return b, s.notWritable(err)
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }() // no longer there when all went well
	made, err := f(dir)
	if err != nil {
		return b, err
	}
	name := made.source.Part + "-" + made.label + "-" + strings.TrimPrefix(filepath.Base(dir), temporaryPrefix)
	m := old.Manifest
	if err := made.apply(&m, name); err != nil {
		return b, err
	}
	if err := s.commit(dir, name, m); err != nil {
		return b, err
	}
	removeUnused(s.Dir, old.Manifest, m)
	return bundle.Read(s.Dir)
}

// current reads what is there. A bundle.json that cannot be read is put aside, since the way out of it is to fetch anew.
func (s *Store) current() (bundle.Bundle, error) {
	b, err := bundle.Read(s.Dir)
	if err == nil {
		return b, nil
	}
	path := filepath.Join(s.Dir, bundle.ManifestName)
	if err := os.Rename(path, path+".bad"); err != nil {
		return b, s.notWritable(err)
	}
	s.Sink.Notice(path + " could not be read and is " + bundle.ManifestName + ".bad now")
	return bundle.Read(s.Dir)
}

func (s *Store) notWritable(err error) error {
	return fault.Wrap(fault.Precondition, err, "cannot change the runtime directory %s", s.Dir).
		WithHint("do it as its owner (sudo), or set %s to a directory of yours", bundle.DirVariable)
}

// removeLeftovers removes what an interrupted change left. What stays is removed by the next one.
func (s *Store) removeLeftovers() {
	found, _ := filepath.Glob(filepath.Join(s.Dir, temporaryPrefix+"*")) // the pattern is valid
	for _, path := range found {
		_ = os.RemoveAll(path)
	}
}

// commit gives the directory its name and writes bundle.json.
func (s *Store) commit(dir, name string, m bundle.Manifest) error {
	if err := errors.Join(os.Chmod(dir, 0o755), artifact.FlushTree(dir)); err != nil {
		return s.notWritable(err)
	}
	final := filepath.Join(s.Dir, name)
	if err := os.Rename(dir, final); err != nil {
		return s.notWritable(err)
	}
	text, err := json.MarshalIndent(m, "", "  ")
	if err == nil {
		err = renameio.WriteFile(filepath.Join(s.Dir, bundle.ManifestName), append(text, '\n'), 0o644)
	}
	if err != nil {
		return errors.Join(s.notWritable(err), os.RemoveAll(final))
	}
	return nil
}

// removeUnused removes the parts that the old manifest named and the new one does not. Programs that run from them run on.
func removeUnused(dir string, old, now bundle.Manifest) {
	used := partsOf(now)
	for _, part := range partsOf(old) {
		if !slices.Contains(used, part) && partPattern.MatchString(part) {
			_ = os.RemoveAll(filepath.Join(dir, part)) // what stays takes room and does no harm
		}
	}
}

func partsOf(m bundle.Manifest) []string {
	var parts []string
	for _, f := range m.Files {
		part, _, _ := strings.Cut(f.Path, "/")
		parts = append(parts, part)
	}
	return parts
}

// change is what a new part brings. Its paths are relative to the part's directory.
type change struct {
	manifest bundle.Manifest // what it names takes the place of what was named so
	source   bundle.Source
	label    string // tells people which one it is, in the name of its directory
}

// apply makes the new part, which will be called name, part of m.
func (c change) apply(m *bundle.Manifest, name string) error {
	in := func(p string) string {
		if p == "" {
			return ""
		}
		return path.Join(name, p)
	}
	replace := func(to *string, p string) {
		if p != "" {
			*to = in(p)
		}
	}
	m.Schema = bundle.Schema
	replace(&m.Kernel, c.manifest.Kernel)
	replace(&m.Initramfs, c.manifest.Initramfs)
	replace(&m.Modules, c.manifest.Modules)
	replace(&m.Image, c.manifest.Image)
	m.VMMs = overlaid(m.VMMs, c.manifest.VMMs, in)
	m.Helpers = overlaid(m.Helpers, c.manifest.Helpers, in)
	if c.source.Part == partBundle {
		m.Version, m.Architecture = c.manifest.Version, c.manifest.Architecture
	}
	m.Sources = append(slices.DeleteFunc(slices.Clone(m.Sources), func(s bundle.Source) bool { return s.Part == c.source.Part }), c.source)
	for _, f := range c.manifest.Files {
		f.Path = in(f.Path)
		m.Files = append(m.Files, f)
	}
	m.Files = stillNamed(*m)
	return nil
}

func overlaid(old, added map[string]string, in func(string) string) map[string]string {
	all := map[string]string{}
	for name, p := range old {
		all[name] = p
	}
	for name, p := range added {
		all[name] = in(p)
	}
	return all
}

// stillNamed returns the files of those directories in which something is named.
func stillNamed(m bundle.Manifest) []bundle.File {
	var used []string
	for _, p := range (bundle.Bundle{Manifest: m}).Parts() {
		part, _, _ := strings.Cut(p.Path, "/")
		used = append(used, part)
	}
	return slices.DeleteFunc(slices.Clone(m.Files), func(f bundle.File) bool {
		part, _, _ := strings.Cut(f.Path, "/")
		return !slices.Contains(used, part)
	})
}

// describe lists all files below dir with their sums.
func describe(ctx context.Context, dir string) ([]bundle.File, error) {
	var files []bundle.File
	err := filepath.WalkDir(dir, func(p string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		if err := ctx.Err(); err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, p)
		if err != nil {
			return err
		}
		f, err := summed(p, filepath.ToSlash(rel))
		files = append(files, f)
		return err
	})
	if err != nil {
		return nil, fault.Wrap(fault.KindOf(err), err, "cannot read what was unpacked")
	}
	return files, nil
}

// summed describes the file at path, which the manifest names as name.
func summed(path, name string) (bundle.File, error) {
	found, err := artifact.Describe(filepath.Dir(path), filepath.Base(path))
	if err != nil {
		return bundle.File{}, err
	}
	return bundle.File{Path: name, Size: found[0].Size, SHA256: found[0].SHA256, Sparse: found[0].Sparse}, nil
}

// Verify sums all files that banger put into the bundle and looks at whether what it names is there. It returns what is wrong, a line
// each.
func Verify(ctx context.Context, b bundle.Bundle) (problems []string, err error) {
	for _, f := range b.Manifest.Files {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if p := wrong(b.Path(f.Path), f); p != "" {
			problems = append(problems, p)
		}
	}
	for _, p := range b.Parts() {
		info, err := os.Stat(p.Path)
		switch {
		case err != nil:
			if !slices.ContainsFunc(problems, func(s string) bool { return strings.HasPrefix(s, p.Path+" ") }) {
				problems = append(problems, p.Path+" (the "+p.Name+") is missing")
			}
		case !info.Mode().IsRegular():
			problems = append(problems, p.Path+" (the "+p.Name+") is no file")
		case isProgram(b, p) && info.Mode()&0o111 == 0:
			problems = append(problems, p.Path+" may not be executed")
		}
	}
	return problems, nil
}

func isProgram(b bundle.Bundle, p bundle.Part) bool {
	return b.Manifest.VMMs[p.Name] != "" || b.Manifest.Helpers[p.Name] != ""
}

func wrong(path string, f bundle.File) string {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return path + " is missing"
	case err != nil:
		return err.Error()
	case info.Size() != f.Size:
		return path + " has another size than it had"
	}
	sumLike := artifact.Sum
	if f.Sparse {
		sumLike = artifact.SparseSum
	}
	sum, _, err := sumLike(path)
	switch {
	case err != nil:
		return err.Error()
	case sum != f.SHA256:
		return path + " was changed: its checksum is wrong"
	}
	return ""
}
