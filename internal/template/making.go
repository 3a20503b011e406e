package template

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/fileio"
)

// Making is a template that is being made, in a directory that no one else looks at.
type Making struct {
	Key   string
	Shape Shape
	Dir   string

	store *Store
	lock  *os.File
}

// spaceForDisks is what the disks of a VM that has just booted take at most, in bytes.
const spaceForDisks = 256 << 20

// Begin makes the directory of a new template. One is made at a time: a Conflict fault says that somebody,
// maybe another daemon, is at it. The caller calls Commit, and Abandon in any case.
func (s *Store) Begin(shape Shape) (*Making, error) {
	if err := os.MkdirAll(s.dir, 0o700); err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot make directory %s", s.dir)
	}
	// Memory is given its space page by page: a guest whose page has none left dies of it.
	if err := disk.RequireFree(s.dir, shape.MemoryBytes+spaceForDisks, "a template"); err != nil {
		return nil, err
	}
	lock, err := s.takeLock()
	if err != nil {
		return nil, err
	}
	m := &Making{Key: shape.Key(), Shape: shape, store: s, lock: lock}
	m.Shape.Format = format
	m.Dir = filepath.Join(s.dir, makingPrefix+m.Key)
	if err := os.Mkdir(m.Dir, 0o700); err != nil {
		_ = unlock(lock)
		return nil, fault.Wrap(fault.Precondition, err, "cannot make a template").WithHint("banger daemon restart removes what an earlier one left")
	}
	return m, nil
}

// unlock lets go at once: a process that is being started may have inherited the file, until it executes its program.
func unlock(f *os.File) error {
	return errors.Join(unix.Flock(int(f.Fd()), unix.LOCK_UN), f.Close())
}

func (s *Store) takeLock() (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(s.dir, lockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot lock the templates")
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		return nil, fault.Wrap(fault.Conflict, err, "another template is being made").WithHint("wait until that is done, then try again")
	}
	return f, nil
}

// Commit flushes the files to the disk, writes the manifest and gives the template its name. disks are the names
// of the disks beside what the driver saved; every other file is removed.
func (m *Making) Commit(ctx context.Context, now time.Time, disks ...string) (Template, error) {
	names := append(append([]string{}, required...), disks...)
	if err := removeOthers(m.Dir, names); err != nil {
		return Template{}, fault.Wrap(fault.Precondition, err, "cannot tidy up template %s", m.Key)
	}
	if err := flushAll(m.Dir, names); err != nil { // before they are measured: space is given out late
		return Template{}, fault.Wrap(fault.Precondition, err, "cannot write template %s", m.Key)
	}
	files, bytes, err := describe(ctx, m.Dir, names)
	if err != nil {
		return Template{}, fault.Wrap(fault.Unexpected, err, "template %s is not complete", m.Key)
	}
	manifest := Manifest{Key: m.Key, Shape: m.Shape, CreatedAt: now.UTC(), SizeBytes: bytes, Files: files}
	if err := writeJSON(filepath.Join(m.Dir, ManifestFile), manifest); err != nil {
		return Template{}, fault.Wrap(fault.Precondition, err, "cannot write the manifest of template %s", m.Key)
	}
	final := m.store.Dir(m.Key)
	if err := m.store.Delete(m.Key); err != nil && fault.KindOf(err) != fault.NotFound { // a damaged one
		return Template{}, err
	}
	err = os.Rename(m.Dir, final)
	if err == nil {
		err = fileio.Flush(m.store.dir)
	}
	if err != nil {
		return Template{}, fault.Wrap(fault.Precondition, err, "cannot put template %s in its place", m.Key)
	}
	return Template{Manifest: manifest, Dir: final}, nil
}

// Abandon removes what was not committed and lets the next one begin. A process that still works in the
// directory must have ended.
func (m *Making) Abandon() error {
	return errors.Join(os.RemoveAll(m.Dir), unlock(m.lock))
}

// KeepLog keeps a file of a making that fails, a log, in the place of the last one's. There may be none.
func (m *Making) KeepLog(name string) error {
	err := os.Rename(filepath.Join(m.Dir, name), m.store.FailedLog())
	if err == nil || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return fault.Wrap(fault.Precondition, err, "cannot keep a log of template %s", m.Key)
}

// Leftover is the directory of a template whose maker died.
type Leftover struct {
	Key string
	Dir string
}

// Leftovers calls end for each directory whose maker died, to end the process that may still work there, and
// removes those for which it succeeds. While somebody makes a template there are none.
func (s *Store) Leftovers(end func(Leftover) error) ([]Leftover, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot list the templates")
	}
	lock, err := s.takeLock()
	if fault.KindOf(err) == fault.Conflict {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() { _ = unlock(lock) }() // there is nothing to lose
	var found []Leftover
	var errs []error
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		if strings.HasPrefix(e.Name(), goingPrefix) {
			errs = append(errs, os.RemoveAll(path))
			continue
		}
		key, ok := strings.CutPrefix(e.Name(), makingPrefix)
		if !ok {
			continue
		}
		l := Leftover{Key: key, Dir: path}
		err := end(l)
		if err == nil {
			err = os.RemoveAll(path)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		found = append(found, l)
	}
	return found, errors.Join(errs...)
}

// removeOthers keeps what is named: logs, locks and the initramfs, which holds a key, are not for clones.
func removeOthers(dir string, names []string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	keep := map[string]bool{}
	for _, name := range names {
		keep[name] = true
	}
	for _, e := range entries {
		if !keep[e.Name()] {
			err = errors.Join(err, os.RemoveAll(filepath.Join(dir, e.Name())))
		}
	}
	return err
}

func flushAll(dir string, names []string) error {
	for _, name := range names {
		if err := fileio.Flush(filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	return fileio.Flush(dir)
}
