package template

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/google/renameio/v2"

	"banger/internal/disk"
	"banger/internal/fault"
)

const (
	makingPrefix = ".new-" // of a template that is being made, and of one that is being removed
	goingPrefix  = ".old-"
	lockFile     = ".lock"
	maxManifest  = 1 << 20 // bytes
)

var keyPattern = regexp.MustCompile(`^[0-9a-f]{16}$`)

// Store holds templates in a directory. Its methods may be called from several goroutines.
type Store struct {
	dir       string
	verifying chan struct{} // holds one token while Verify reads

	mu    sync.Mutex           // for use.json and marks
	marks map[string]disk.Mark // of files, by path, whose content was found to be right
}

// Open returns the store in dir, which need not be there yet.
func Open(dir string) *Store { return &Store{dir: dir, verifying: make(chan struct{}, 1)} }

// Dir returns the directory of the template with a key.
func (s *Store) Dir(key string) string { return filepath.Join(s.dir, key) }

// FailedLog is the log of the last making that failed.
func (s *Store) FailedLog() string { return filepath.Join(s.dir, "failed.log") }

// List returns all templates, oldest first, also those with a Problem.
func (s *Store) List() ([]Template, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot list the templates")
	}
	var all []Template
	for _, e := range entries {
		if !keyPattern.MatchString(e.Name()) {
			continue
		}
		t, err := s.Get(e.Name())
		if fault.KindOf(err) == fault.NotFound { // removed meanwhile
			continue
		}
		if err != nil {
			t.Problem = err.Error()
			t.Key, t.Dir = e.Name(), s.Dir(e.Name())
		}
		all = append(all, t)
	}
	slices.SortStableFunc(all, func(a, b Template) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return all, nil
}

// Get returns the template with a key, whose files are all there, with the sizes and times they were made with; Verify
// looks into them. NotFound says that there is none; a damaged one is a Precondition fault, and what could be read of it is
// returned.
func (s *Store) Get(key string) (Template, error) {
	dir := s.Dir(key)
	if !keyPattern.MatchString(key) {
		return Template{}, missing(key)
	}
	if _, err := os.Lstat(dir); errors.Is(err, os.ErrNotExist) {
		return Template{}, missing(key)
	}
	t := Template{Dir: dir}
	if err := readJSON(filepath.Join(dir, ManifestFile), &t.Manifest); err != nil {
		return t, damaged(key, err, "its manifest cannot be read")
	}
	var u use
	if readJSON(filepath.Join(dir, useFile), &u) == nil { // without it the template was never used
		t.Uses, t.LastUsedAt = u.Uses, u.LastUsedAt
	}
	if t.Key != key || t.Shape.Key() != key {
		return t, damaged(key, nil, "its manifest tells of another one")
	}
	return t, t.check()
}

// check compares the files with the manifest.
func (t Template) check() error {
	for _, name := range required {
		if !slices.ContainsFunc(t.Files, func(f File) bool { return f.Name == name }) {
			return damaged(t.Key, nil, "its manifest does not tell of %s", name)
		}
	}
	for _, f := range t.Files {
		info, err := os.Lstat(filepath.Join(t.Dir, f.Name))
		switch {
		case err != nil:
			return damaged(t.Key, err, "file %s cannot be read", f.Name)
		case !info.Mode().IsRegular() || info.Size() != f.Size || info.ModTime().UnixNano() != f.ModTime:
			return damaged(t.Key, nil, "file %s was changed", f.Name)
		}
	}
	return nil
}

// Find returns the key of the one template whose key begins with prefix, whole or damaged.
func (s *Store) Find(prefix string) (string, error) {
	all, err := s.List()
	if err != nil {
		return "", err
	}
	var found []string
	for _, t := range all {
		if prefix != "" && strings.HasPrefix(t.Key, prefix) {
			found = append(found, t.Key)
		}
	}
	switch len(found) {
	case 0:
		return "", missing(prefix)
	case 1:
		return found[0], nil
	}
	return "", fault.New(fault.Conflict, "%d templates have keys that begin with %s", len(found), prefix).
		WithHint("give more digits: banger template list")
}

// Used counts a use. A template that vanished meanwhile is none of its business.
func (s *Store) Used(key string, now time.Time) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	path := filepath.Join(s.Dir(key), useFile)
	var u use
	if err := readJSON(path, &u); err != nil && !errors.Is(err, os.ErrNotExist) {
		u = use{}
	}
	u.Uses, u.LastUsedAt = u.Uses+1, now.UTC()
	text, err := json.Marshal(u)
	if err != nil {
		return err
	}
	// No flush: it only decides what is evicted first.
	temporary := path + ".new"
	err = os.WriteFile(temporary, append(text, '\n'), 0o600)
	if err == nil {
		err = os.Rename(temporary, path)
	}
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

// Delete removes a template. VMs restored from it run on: what they have mapped stays on the disk, without a
// name, until the last of them ends.
func (s *Store) Delete(key string) error {
	if !keyPattern.MatchString(key) {
		return missing(key)
	}
	s.forget(key)
	// First its name goes, so that nobody finds a half of it.
	going := filepath.Join(s.dir, goingPrefix+key)
	if err := os.RemoveAll(going); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot remove template %s", key)
	}
	if err := os.Rename(s.Dir(key), going); err != nil {
		if errors.Is(err, os.ErrNotExist) {
			return missing(key)
		}
		return fault.Wrap(fault.Precondition, err, "cannot remove template %s", key)
	}
	if err := os.RemoveAll(going); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot remove template %s", key)
	}
	return nil
}

// Evict removes templates that were not used for maxAge, and then those unused for longest until all together
// take at most budget bytes, or one is left. Those in keep stay: removing a template that VMs run on frees nothing. It
// returns the keys of those that went.
func (s *Store) Evict(now time.Time, maxAge time.Duration, budget int64, keep map[string]bool) ([]string, error) {
	all, err := s.List()
	if err != nil {
		return nil, err
	}
	var gone []string
	for _, key := range victims(all, now, maxAge, budget, keep) {
		if err := s.Delete(key); err != nil && fault.KindOf(err) != fault.NotFound {
			return gone, err
		}
		gone = append(gone, key)
	}
	return gone, nil
}

// victims chooses whom Evict removes.
func victims(all []Template, now time.Time, maxAge time.Duration, budget int64, keep map[string]bool) []string {
	all = slices.Clone(all)
	slices.SortStableFunc(all, func(a, b Template) int { return a.touched().Compare(b.touched()) })
	var total int64
	for _, t := range all {
		total += t.SizeBytes
	}
	var out []string
	for i, t := range all {
		old := now.Sub(t.touched()) > maxAge
		// The newest stays however large it is: it would be made again and again.
		fits := total <= budget || i == len(all)-1
		if keep[t.Key] || !old && fits {
			continue
		}
		out = append(out, t.Key)
		total -= t.SizeBytes
	}
	return out
}

// touched is when somebody last wanted it.
func (t Template) touched() time.Time {
	if t.LastUsedAt.After(t.CreatedAt) {
		return t.LastUsedAt
	}
	return t.CreatedAt
}

func missing(key string) error {
	return fault.New(fault.NotFound, "there is no template %q", key).WithHint("see what there is: banger template list")
}

func damaged(key string, cause error, format string, args ...any) error {
	return fault.Wrap(fault.Precondition, cause, "template %s is damaged: "+format, append([]any{key}, args...)...).
		WithHint("remove it, the next create makes it anew: banger template delete %s", key)
}

func readJSON(path string, v any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return err
	}
	return json.Unmarshal(text, v)
}

func writeJSON(path string, v any) error {
	text, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return renameio.WriteFile(path, append(text, '\n'), 0o600, renameio.IgnoreUmask())
}

// describe returns what a manifest says about the named files below dir, and what they take on disk.
func describe(ctx context.Context, dir string, names []string) (files []File, bytes int64, err error) {
	for _, name := range names {
		path := filepath.Join(dir, name)
		info, err := os.Lstat(path)
		if err != nil {
			return nil, 0, err
		}
		n, err := disk.AllocatedBytes(path)
		if err != nil {
			return nil, 0, err
		}
		bytes += n
		sum, err := disk.Sum(ctx, path)
		if err != nil {
			return nil, 0, err
		}
		files = append(files, File{Name: name, Size: info.Size(), ModTime: info.ModTime().UnixNano(), CRC32C: sum})
	}
	return files, bytes, nil
}
