// Package artifact keeps what banger builds once and uses often, kernels and images: a directory
// per thing with its files and a manifest. A thing is built aside and appears whole, under a name
// that never means another content; a build that died leaves only what the next one removes.
package artifact

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/fileio"
)

const (
	temporaryPrefix = ".new-"
	lockName        = ".lock"
	defaultName     = "default"
	maxManifest     = 8 << 20 // bytes
)

// File is one file of an artifact, as its manifest tells it.
type File struct {
	Name    string `json:"name"` // relative to the artifact's directory
	Size    int64  `json:"size"` // bytes
	SHA256  string `json:"sha256"`
	Sparse  bool   `json:"sparse,omitempty"` // the sum is a SparseSum
	ModTime int64  `json:"mtime"`            // nanoseconds since the Unix epoch; another one makes the sum be checked
}

// Shelf is a directory of artifacts of one kind.
type Shelf struct {
	dir      string
	kind     string // "kernel" or "image": for the words of errors
	manifest string // file name of the manifest

	mu       sync.Mutex
	verified map[string]File // by path: what was found right although its mtime differs
}

// Open returns the shelf in dir, which need not be there yet.
func Open(dir, kind, manifest string) *Shelf {
	return &Shelf{dir: dir, kind: kind, manifest: manifest, verified: map[string]File{}}
}

// Dir returns the directory of one artifact.
func (s *Shelf) Dir(name string) string { return filepath.Join(s.dir, name) }

// Names returns the names of all artifacts, whole or damaged, sorted.
func (s *Shelf) Names() ([]string, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Unexpected, err, "cannot list the %ss", s.kind)
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

// Has tells whether there is an artifact of that name, whole or damaged.
func (s *Shelf) Has(name string) bool {
	names, err := s.Names()
	return err == nil && slices.Contains(names, name)
}

// Default returns the name of the artifact that is used when none is named, or "".
func (s *Shelf) Default() (string, error) {
	b, err := os.ReadFile(filepath.Join(s.dir, defaultName))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", fault.Wrap(fault.Unexpected, err, "cannot tell the default %s", s.kind)
	}
	return strings.TrimSpace(string(b)), nil
}

// SetDefault makes name the one that is used when none is named.
func (s *Shelf) SetDefault(name string) error {
	path := filepath.Join(s.dir, defaultName)
	// Not with the prefix: a build that begins right now would take it for a left-over.
	temporary := filepath.Join(s.dir, "."+defaultName)
	err := os.WriteFile(temporary, []byte(name+"\n"), 0o600)
	if err == nil {
		err = fileio.Flush(temporary) // a power cut leaves the old name or the new one, never none
	}
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if err == nil {
		err = fileio.Flush(s.dir)
	}
	if err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot make %s the default %s", name, s.kind)
	}
	return nil
}

// Missing is the fault for an artifact that is not there; name "" stands for the default.
func (s *Shelf) Missing(name string) error {
	if names, err := s.Names(); name == "" && err == nil && len(names) > 0 {
		return fault.New(fault.NotFound, "there is no default %s", s.kind).
			WithHint("choose one with: banger %s default %s; or make one with: banger setup", s.kind, names[0])
	}
	if name == "" {
		return fault.New(fault.NotFound, "there is no %s yet", s.kind).WithHint("make one with: banger setup")
	}
	return fault.New(fault.NotFound, "there is no %s %q", s.kind, name).
		WithHint("banger %s list shows what there is, banger setup makes the default", s.kind)
}

func (s *Shelf) damaged(name string, cause error, format string, args ...any) error {
	return fault.Wrap(fault.Precondition, cause, "%s %s is damaged: %s", s.kind, name, fmt.Sprintf(format, args...)).
		WithHint("%s", s.remedy(name))
}

// remedy says how to come by a damaged artifact again: as it was made, which its manifest tells if it is left.
func (s *Shelf) remedy(name string) string {
	var m struct {
		Source string                   `json:"source"` // it was imported
		Build  *struct{ Recipe string } `json:"build"`
	}
	b, err := os.ReadFile(filepath.Join(s.dir, name, s.manifest))
	if err == nil {
		err = json.Unmarshal(b, &m)
	}
	switch {
	case err != nil || m.Source == "" && m.Build == nil:
		return "make it again with: banger setup --rebuild"
	case m.Build != nil:
		return "build it again with: banger image build " + m.Build.Recipe
	}
	return fmt.Sprintf("import it again: banger %s import %s; then delete this one: banger %s delete %s", s.kind, m.Source, s.kind, name)
}

// Problem is how lists tell of an artifact that cannot be used: what is wrong, and what mends it.
func Problem(err error) string {
	if hint := fault.HintOf(err); hint != "" {
		return err.Error() + "; " + hint
	}
	return err.Error()
}

// ReadManifest decodes the manifest of an artifact into v.
func (s *Shelf) ReadManifest(name string, v any) error {
	f, err := os.Open(filepath.Join(s.dir, name, s.manifest))
	if err != nil {
		return s.damaged(name, err, "no manifest")
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err == nil {
		err = json.Unmarshal(b, v)
	}
	if err != nil {
		return s.damaged(name, err, "its manifest cannot be read")
	}
	return nil
}

// Present finds files that are missing or have another size than an artifact's manifest says. It reads no content, so it
// costs nothing.
func (s *Shelf) Present(name string) error {
	var m struct {
		Files []File `json:"files"`
	}
	if err := s.ReadManifest(name, &m); err != nil {
		return err
	}
	if len(m.Files) == 0 {
		return s.damaged(name, nil, "its manifest names no files")
	}
	for _, f := range m.Files {
		if _, err := s.stat(name, f); err != nil {
			return err
		}
	}
	return nil
}

func (s *Shelf) stat(name string, f File) (os.FileInfo, error) {
	info, err := os.Stat(filepath.Join(s.dir, name, f.Name))
	switch {
	case err != nil:
		return nil, s.damaged(name, err, "file %s cannot be read", f.Name)
	case info.Size() != f.Size:
		return nil, s.damaged(name, nil, "file %s has %d bytes instead of %d", f.Name, info.Size(), f.Size)
	}
	return info, nil
}

// Check finds files that are missing, have another size, or were changed: where the modification time
// is not the manifest's, the whole content is summed, once in the life of this shelf.
func (s *Shelf) Check(name string, files []File) error {
	for _, f := range files {
		path := filepath.Join(s.dir, name, f.Name)
		info, err := s.stat(name, f)
		if err != nil {
			return err
		}
		if info.ModTime().UnixNano() == f.ModTime {
			continue
		}
		now := f
		now.ModTime = info.ModTime().UnixNano()
		if s.known(path, now) {
			continue
		}
		if err := s.checkSum(name, f); err != nil {
			return err
		}
		s.mu.Lock()
		s.verified[path] = now
		s.mu.Unlock()
	}
	return nil
}

func (s *Shelf) known(path string, f File) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.verified[path] == f
}

// Verify sums the whole content of all files.
func (s *Shelf) Verify(ctx context.Context, name string, files []File) error {
	for _, f := range files {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := s.checkSum(name, f); err != nil {
			return err
		}
	}
	return nil
}

func (s *Shelf) checkSum(name string, f File) error {
	sum, _, err := sumLike(filepath.Join(s.dir, name, f.Name), f.Sparse)
	if err != nil {
		return s.damaged(name, err, "file %s cannot be read", f.Name)
	}
	if sum != f.SHA256 {
		return s.damaged(name, nil, "file %s has a wrong checksum", f.Name)
	}
	return nil
}

// Describe returns what the manifest says about the named files below dir.
func Describe(dir string, names ...string) ([]File, error) {
	var files []File
	for _, name := range names {
		path := filepath.Join(dir, name)
		info, err := os.Stat(path)
		if err != nil {
			return nil, err
		}
		sparse, err := mostlyZero(path)
		if err != nil {
			return nil, err
		}
		sum, size, err := sumLike(path, sparse)
		if err != nil {
			return nil, err
		}
		files = append(files, File{Name: name, Size: size, SHA256: sum, Sparse: sparse, ModTime: info.ModTime().UnixNano()})
	}
	return files, nil
}

// Digest sums up the contents of files, whatever their times: "sha256:" and 64 hex digits.
func Digest(files []File) string {
	h := sha256.New()
	for _, f := range files {
		fmt.Fprintf(h, "%s %d %s\n", f.Name, f.Size, f.SHA256)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil))
}

// Build has f build an artifact in a new directory. f returns the name and the manifest to write;
// then the artifact appears. One of the same name is replaced. Several may be built at the same time.
func (s *Shelf) Build(f func(dir string) (name string, manifest any, err error)) (name string, err error) {
	dir, release, err := s.begin()
	if err != nil {
		return "", err
	}
	defer func() {
		err = errors.Join(err, os.RemoveAll(dir))
		release()
	}()

	name, manifest, err := f(dir)
	if err != nil {
		return "", err
	}
	if err := writeManifest(filepath.Join(dir, s.manifest), manifest); err != nil {
		return "", fault.Wrap(fault.Unexpected, err, "cannot write the manifest of %s %s", s.kind, name)
	}
	unlock, err := s.lock()
	if err != nil {
		return "", err
	}
	defer unlock()
	if err := s.appear(dir, name); err != nil {
		return "", fault.Wrap(fault.Unexpected, err, "cannot put %s %s in its place", s.kind, name)
	}
	return name, nil
}

// begin makes the directory of a build, and removes those that dead ones left. A builder holds a lock on its
// directory, by which the two are told apart.
func (s *Shelf) begin() (dir string, release func(), err error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return "", nil, fault.Wrap(fault.Precondition, err, "cannot make directory %s", s.dir)
	}
	unlock, err := s.lock()
	if err != nil {
		return "", nil, err
	}
	defer unlock()
	if err := s.removeLeftovers(); err != nil {
		return "", nil, err
	}
	dir, err = os.MkdirTemp(s.dir, temporaryPrefix)
	if err != nil {
		return "", nil, fault.Wrap(fault.Precondition, err, "cannot build a %s", s.kind)
	}
	release, err = take(dir, syscall.LOCK_EX|syscall.LOCK_NB)
	if err != nil {
		return "", nil, errors.Join(fault.Wrap(fault.Unexpected, err, "cannot build a %s", s.kind), os.Remove(dir))
	}
	return dir, release, nil
}

// lock makes the caller the one who changes what is on the shelf. Nobody holds it for long.
func (s *Shelf) lock() (unlock func(), err error) {
	path := filepath.Join(s.dir, lockName)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err == nil {
		err = f.Close()
	}
	if err == nil {
		unlock, err = take(path, syscall.LOCK_EX)
	}
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot lock the %ss", s.kind)
	}
	return unlock, nil
}

// take locks a file or directory; the lock goes with our process.
func take(path string, how int) (release func(), err error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), how); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return func() { _ = f.Close() }, nil
}

func (s *Shelf) removeLeftovers() error {
	found, err := filepath.Glob(filepath.Join(s.dir, temporaryPrefix+"*"))
	if err != nil {
		return err
	}
	for _, path := range found {
		release, err := take(path, syscall.LOCK_EX|syscall.LOCK_NB)
		if errors.Is(err, syscall.EWOULDBLOCK) {
			continue // at work
		}
		if err == nil {
			err = os.RemoveAll(path)
			release()
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fault.Wrap(fault.Precondition, err, "cannot remove what an earlier build left").WithHint("remove %s", path)
		}
	}
	return nil
}

// Delete removes an artifact. used is asked whether somebody needs it, and asked again while the artifact is out of the way
// already; then it is put back, and used's error returned.
func (s *Shelf) Delete(name string, used func() error) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	if !s.Has(name) {
		return s.Missing(name)
	}
	if err := used(); err != nil { // what is in use is not even moved: we may die before it is back
		return err
	}
	aside := filepath.Join(s.dir, temporaryPrefix+"deleted-"+name)
	if err := os.Rename(s.Dir(name), aside); err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot delete %s %s", s.kind, name)
	}
	if err := used(); err != nil {
		return errors.Join(err, os.Rename(aside, s.Dir(name)))
	}
	if err := errors.Join(os.RemoveAll(aside), fileio.Flush(s.dir)); err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot delete all of %s %s", s.kind, name).WithHint("remove %s", aside)
	}
	return nil
}

// Rename gives an artifact another name, with the manifest that says so. used is asked as Delete asks it.
func (s *Shelf) Rename(name, to string, manifest any, used func() error) error {
	unlock, err := s.lock()
	if err != nil {
		return err
	}
	defer unlock()
	switch {
	case !s.Has(name):
		return s.Missing(name)
	case s.Has(to):
		return fault.New(fault.Conflict, "the name %q is taken", to).WithHint("choose another name: banger %s list", s.kind)
	}
	if err := used(); err != nil {
		return err
	}
	// The directory first: a manifest that tells of another name is called damage until it is written, and then
	// the old name is nowhere.
	if err := os.Rename(s.Dir(name), s.Dir(to)); err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot rename %s %s", s.kind, name)
	}
	err = replaceManifest(filepath.Join(s.Dir(to), s.manifest), manifest)
	if err == nil {
		err = used() // somebody may have come to need it
	}
	if err != nil {
		return errors.Join(err, os.Rename(s.Dir(to), s.Dir(name)))
	}
	return fileio.Flush(s.dir)
}

func replaceManifest(path string, v any) error {
	temporary := path + ".new"
	if err := errors.Join(writeManifest(temporary, v), fileio.Flush(temporary)); err != nil {
		return err
	}
	return os.Rename(temporary, path)
}

func writeManifest(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o600)
}

// appear flushes the directory dir to stable storage and gives it its name. An older artifact changes
// places with it, in one step where the file system can; whoever has its files open keeps them.
func (s *Shelf) appear(dir, name string) error {
	if err := fileio.FlushTree(dir); err != nil {
		return err
	}
	final := s.Dir(name)
	if unix.Renameat2(unix.AT_FDCWD, dir, unix.AT_FDCWD, final, unix.RENAME_EXCHANGE) == nil {
		return fileio.Flush(s.dir) // the caller removes dir, which is the old one now
	}
	old := filepath.Join(s.dir, temporaryPrefix+"old-"+name)
	if err := os.Rename(final, old); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Rename(dir, final); err != nil {
		return err
	}
	return errors.Join(fileio.Flush(s.dir), os.RemoveAll(old))
}

// Reconcile looks whether the default artifact can be used, by check. When there is no default and just one that can
// be, that one becomes it. It returns what it did and what is wrong, a line each.
func (s *Shelf) Reconcile(check func(name string) error) []string {
	names, err := s.Names()
	if err != nil {
		return []string{err.Error()}
	}
	def, err := s.Default()
	switch {
	case err != nil:
		return []string{err.Error()}
	case def == "" && len(names) == 0: // a fresh machine: who needs one says how to make it
		return nil
	case def != "" && s.Has(def):
		if err = check(def); err == nil {
			return nil
		}
	case def != "":
		err = s.Missing(def)
	}
	names = slices.DeleteFunc(names, func(name string) bool { return check(name) != nil })
	wrong := "not mended: no default " + s.kind + " is chosen"
	if def != "" {
		wrong = fmt.Sprintf("not mended: the default %s cannot be used: %s", s.kind, Problem(err))
	}
	switch {
	case def == "" && len(names) == 1:
		if err := s.SetDefault(names[0]); err != nil {
			return []string{err.Error()}
		}
		return []string{fmt.Sprintf("%s %s is the default now: it is the only one", s.kind, names[0])}
	case len(names) > 0:
		return []string{fmt.Sprintf("%s; or choose another: banger %s default %s", wrong, s.kind, names[0])}
	case def == "":
		return []string{wrong + ", and none can be used; make one: banger setup --rebuild"}
	}
	return []string{wrong}
}
