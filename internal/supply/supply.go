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
	"golang.org/x/sys/unix"

	"banger/internal/artifact"
	"banger/internal/bundle"
	"banger/internal/fault"
	"banger/internal/fileio"
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
	// intentName is a file with the names of parts, a line each, of which some are in use neither before nor after the change
	// that is under way: whoever comes after a kill removes what bundle.json does not name.
	intentName = ".banger-change"
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
	old, err := s.current()
	if err != nil {
		return b, err
	}
	s.removeLeftovers(old.Manifest)
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
	if err := s.commit(dir, name, old.Manifest, m); err != nil {
		return b, err
	}
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
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		return fault.Wrap(fault.Precondition, err, "no room in the runtime directory %s", s.Dir).WithHint("free some space there, then try again")
	}
	return fault.Wrap(fault.Precondition, err, "cannot change the runtime directory %s", s.Dir).
		WithHint("do it as its owner (sudo), or set %s to a directory of yours", bundle.DirVariable)
}

// writable tells before a long download whether the directory can be changed at all.
func (s *Store) writable() error {
	err := os.MkdirAll(s.Dir, 0o755)
	if err == nil {
		err = unix.Access(s.Dir, unix.W_OK|unix.X_OK)
	}
	if err != nil {
		return s.notWritable(err)
	}
	return nil
}

// removeLeftovers removes what an interrupted change left. What stays is removed by the next one.
func (s *Store) removeLeftovers(now bundle.Manifest) {
	for _, pattern := range []string{temporaryPrefix + "*", "." + bundle.ManifestName + "*", "." + intentName + "*"} {
		found, _ := filepath.Glob(filepath.Join(s.Dir, pattern)) // the pattern is valid
		for _, path := range found {
			_ = os.RemoveAll(path)
		}
	}
	s.removeUnused(now)
}

// commit gives the directory its name, writes bundle.json, and removes what the old one named and the new one does not.
func (s *Store) commit(dir, name string, old, now bundle.Manifest) error {
	text, err := json.MarshalIndent(now, "", "  ")
	if err := errors.Join(err, os.Chmod(dir, 0o755), fileio.FlushTree(dir)); err != nil {
		return s.notWritable(err)
	}
	intent := strings.Join(append(partsOf(old), name), "\n")
	if err := renameio.WriteFile(filepath.Join(s.Dir, intentName), []byte(intent), 0o644); err != nil {
		return s.notWritable(err)
	}
	final := filepath.Join(s.Dir, name)
	err = os.Rename(dir, final)
	if err == nil {
		err = renameio.WriteFile(filepath.Join(s.Dir, bundle.ManifestName), append(text, '\n'), 0o644)
	}
	if err != nil {
		return errors.Join(s.notWritable(err), os.RemoveAll(final))
	}
	s.removeUnused(now)
	return nil
}

// removeUnused removes the parts that the intent of a change names and the manifest does not. Programs that run from them run on.
func (s *Store) removeUnused(now bundle.Manifest) {
	path := filepath.Join(s.Dir, intentName)
	intent, err := os.ReadFile(path)
	if err != nil {
		return // no change broke off
	}
	used := partsOf(now)
	for _, part := range strings.Split(string(intent), "\n") {
		if !slices.Contains(used, part) && partPattern.MatchString(part) {
			_ = os.RemoveAll(filepath.Join(s.Dir, part)) // what stays takes room and does no harm
		}
	}
	_ = os.Remove(path)
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

// Problem is one thing that is wrong in a runtime directory.
type Problem struct {
	Text string   // begins with the path
	Mend []string // arguments of the banger that mends it; none: banger did not put it there
}

// Verify sums all files that banger put into the bundle and looks at whether what it names is there. It returns what is wrong.
func Verify(ctx context.Context, b bundle.Bundle) (problems []Problem, err error) {
	told := map[string]bool{}
	tell := func(path, text string) {
		told[path] = true
		problems = append(problems, Problem{Text: path + " " + text, Mend: mend(b, path)})
	}
	for _, f := range b.Manifest.Files {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if text := wrong(b.Path(f.Path), f); text != "" {
			tell(b.Path(f.Path), text)
		}
	}
	for _, p := range b.Parts() {
		info, err := os.Stat(p.Path)
		switch {
		case told[p.Path]:
		case err != nil:
			tell(p.Path, "(the "+p.Name+") is missing")
		case !info.Mode().IsRegular():
			tell(p.Path, "(the "+p.Name+") is no file")
		case isProgram(b, p) && info.Mode()&0o111 == 0:
			tell(p.Path, "may not be executed")
		}
	}
	return problems, nil
}

// mend returns how to get the file at path again, by where it came from.
func mend(b bundle.Bundle, path string) []string {
	s, known := b.SourceOf(path)
	switch {
	case known && s.Part == partBundle && s.Manifest != "":
		return []string{"runtime", "fetch", "--manifest", s.Manifest}
	case known && s.Part == partBundle:
		return []string{"runtime", "fetch"}
	case known && s.Part == partFirecracker && filepath.IsAbs(s.URL):
		return []string{"runtime", "install", "firecracker", "--from", s.URL}
	case known && s.Part == partFirecracker:
		return []string{"runtime", "install", "firecracker", "--version", s.Version}
	}
	return nil
}

func isProgram(b bundle.Bundle, p bundle.Part) bool {
	return b.Manifest.VMMs[p.Name] != "" || b.Manifest.Helpers[p.Name] != ""
}

// wrong tells what is wrong with the file at path; "" is nothing.
func wrong(path string, f bundle.File) string {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return "is missing"
	case err != nil:
		return "cannot be read: " + err.Error()
	case !info.Mode().IsRegular():
		return "is no file"
	case info.Size() != f.Size:
		return "has another size than it had"
	}
	sumLike := artifact.Sum
	if f.Sparse {
		sumLike = artifact.SparseSum
	}
	sum, _, err := sumLike(path)
	switch {
	case err != nil:
		return "cannot be read: " + err.Error()
	case sum != f.SHA256:
		return "was changed: its checksum is wrong"
	}
	return ""
}
