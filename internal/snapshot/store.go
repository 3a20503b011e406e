package snapshot

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/fileio"
	"banger/internal/vm"
)

const (
	makingPrefix = ".new-" // of a snapshot that is being made, and of one that is being removed
	goingPrefix  = ".old-"
	maxManifest  = 1 << 20 // bytes
)

// Store holds the snapshots of one VM in a directory, which need not be there yet. Whoever changes
// something in it owns the VM; reading waits for nobody.
type Store struct {
	dir string
	vm  string // its name, for messages
}

// Open returns the store in dir of the VM with that name.
func Open(dir, name string) Store { return Store{dir: dir, vm: name} }

func (s Store) missing(tag string) error {
	return fault.New(fault.NotFound, "VM %s has no snapshot %s", s.vm, tag).WithHint("see what there is: banger vm snapshot list %s", s.vm)
}

// List returns all snapshots, oldest first, also those with a Problem.
func (s Store) List() ([]Snapshot, error) {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot list the snapshots of VM %s", s.vm)
	}
	var all []Snapshot
	for _, e := range entries {
		if vm.CheckTag(e.Name()) != nil {
			continue
		}
		one, err := s.Get(e.Name())
		if fault.KindOf(err) == fault.NotFound { // removed meanwhile
			continue
		}
		if err != nil {
			one.Problem = err.Error()
			one.Tag, one.Dir = e.Name(), filepath.Join(s.dir, e.Name())
		}
		all = append(all, one)
	}
	slices.SortStableFunc(all, func(a, b Snapshot) int { return a.CreatedAt.Compare(b.CreatedAt) })
	return all, nil
}

// Get returns a snapshot whose files are all there. NotFound says that there is none; a damaged one is a
// Precondition fault, and what could be read of it is returned.
func (s Store) Get(tag string) (Snapshot, error) {
	if err := vm.CheckTag(tag); err != nil {
		return Snapshot{}, err
	}
	one := Snapshot{Dir: filepath.Join(s.dir, tag)}
	if _, err := os.Lstat(one.Dir); errors.Is(err, os.ErrNotExist) {
		return Snapshot{}, s.missing(tag)
	}
	if err := readManifest(filepath.Join(one.Dir, ManifestFile), &one.Manifest); err != nil {
		return one, fault.Wrap(fault.Precondition, err, "snapshot %s of VM %s is damaged", tag, s.vm)
	}
	if one.Tag != tag {
		return one, fault.New(fault.Precondition, "snapshot %s of VM %s is damaged: its manifest is of %q", tag, s.vm, one.Tag)
	}
	err := one.measure()
	return one, err
}

// measure compares the files with the manifest and adds up their sizes.
func (one *Snapshot) measure() error {
	for name, want := range one.Files {
		if !filepath.IsLocal(name) {
			return fault.New(fault.Precondition, "snapshot %s is damaged: its manifest names %q", one.Tag, name)
		}
		path := filepath.Join(one.Dir, name)
		info, err := os.Lstat(path)
		if err != nil {
			return fault.Wrap(fault.Precondition, err, "snapshot %s is damaged", one.Tag)
		}
		if !info.Mode().IsRegular() || info.Size() != want {
			return fault.New(fault.Precondition, "snapshot %s is damaged: %s is %d bytes long, was %d", one.Tag, name, info.Size(), want)
		}
		allocated, err := disk.AllocatedBytes(path)
		if err != nil {
			return err
		}
		one.ApparentBytes += want
		one.RealBytes += allocated
	}
	return nil
}

// CheckMemory reads the memory of a snapshot, of kind Memory, and compares it with the manifest. What is damaged is a
// Precondition fault.
func (one *Snapshot) CheckMemory(ctx context.Context) error {
	for name, want := range one.MemoryCRC32C {
		if !filepath.IsLocal(name) {
			return fault.New(fault.Precondition, "snapshot %s is damaged: its manifest names %q", one.Tag, name)
		}
		sum, err := disk.Sum(ctx, filepath.Join(one.Dir, name))
		switch {
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case err != nil:
			return fault.Wrap(fault.Precondition, err, "snapshot %s is damaged", one.Tag)
		case sum != want:
			return fault.New(fault.Precondition, "snapshot %s is damaged: the content of %s has changed", one.Tag, name)
		}
	}
	return nil
}

func readManifest(path string, m *Manifest) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	raw, err := io.ReadAll(io.LimitReader(f, maxManifest))
	if err != nil {
		return err
	}
	return json.Unmarshal(raw, m)
}

// FreeTag makes up a tag from the time that no snapshot has.
func (s Store) FreeTag(now time.Time) (string, error) {
	base := now.UTC().Format("20060102-150405")
	tag := base
	for n := 2; n <= maxSnapshots+1; n++ {
		if _, err := os.Lstat(filepath.Join(s.dir, tag)); errors.Is(err, os.ErrNotExist) {
			return tag, nil
		}
		tag = fmt.Sprintf("%s-%d", base, n)
	}
	return "", fault.New(fault.Conflict, "VM %s has a snapshot %s already", s.vm, base)
}

// CheckNew finds what would keep a snapshot from being made.
func (s Store) CheckNew(tag string) error {
	if err := vm.CheckTag(tag); err != nil {
		return err
	}
	if _, err := os.Lstat(filepath.Join(s.dir, tag)); err == nil {
		return fault.New(fault.Conflict, "VM %s has a snapshot %s already", s.vm, tag).
			WithHint("choose another tag, or delete it: banger vm snapshot delete %s %s", s.vm, tag)
	}
	entries, err := os.ReadDir(s.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fault.Wrap(fault.Precondition, err, "cannot list the snapshots of VM %s", s.vm)
	}
	if len(entries) >= maxSnapshots {
		return fault.New(fault.Precondition, "VM %s has %d snapshots, the most there may be", s.vm, len(entries)).
			WithHint("delete some: banger vm snapshot delete %s TAG", s.vm)
	}
	return nil
}

// Make returns a new directory to make a snapshot in; Keep gives it its name, Discard removes it.
func (s Store) Make(tag string) (string, error) {
	dir := filepath.Join(s.dir, makingPrefix+tag)
	err := os.MkdirAll(s.dir, 0o700)
	if err == nil {
		err = os.RemoveAll(dir)
	}
	if err == nil {
		err = os.Mkdir(dir, 0o700)
	}
	if err != nil {
		return "", fault.Wrap(fault.Precondition, err, "cannot make a snapshot of VM %s", s.vm)
	}
	return dir, nil
}

// Discard removes what Make returned.
func (s Store) Discard(dir string) error {
	if err := os.RemoveAll(dir); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot remove what there was of a snapshot of VM %s", s.vm)
	}
	return nil
}

// Keep makes what is in dir the snapshot of that manifest, on stable storage.
func (s Store) Keep(ctx context.Context, dir string, m Manifest) (Snapshot, error) {
	if err := s.keep(ctx, dir, m); err != nil {
		if ctx.Err() != nil {
			return Snapshot{}, context.Cause(ctx)
		}
		return Snapshot{}, fault.Wrap(fault.Precondition, err, "cannot keep snapshot %s of VM %s", m.Tag, s.vm)
	}
	return s.Get(m.Tag)
}

func (s Store) keep(ctx context.Context, dir string, m Manifest) error {
	if err := fileio.FlushTree(dir); err != nil { // before they are measured: space is given out late
		return err
	}
	files, err := sizes(dir)
	if err != nil {
		return err
	}
	m.Files, m.MemoryCRC32C = files, map[string]uint32{}
	for name := range files {
		if filepath.Dir(name) != MemoryDir {
			continue
		}
		if m.MemoryCRC32C[name], err = disk.Sum(ctx, filepath.Join(dir, name)); err != nil {
			return err
		}
	}
	text, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	path := filepath.Join(dir, ManifestFile)
	if err := os.WriteFile(path, text, 0o600); err != nil {
		return err
	}
	for _, p := range []string{path, dir} {
		if err := fileio.Flush(p); err != nil {
			return err
		}
	}
	if err := os.Rename(dir, filepath.Join(s.dir, m.Tag)); err != nil {
		return err
	}
	return fileio.Flush(s.dir)
}

// sizes returns the sizes of the files below dir.
func sizes(dir string) (map[string]int64, error) {
	files := map[string]int64{}
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() {
			return err
		}
		info, err := e.Info()
		if err == nil {
			files[strings.TrimPrefix(path, dir+string(filepath.Separator))] = info.Size()
		}
		return err
	})
	return files, err
}

// Delete removes a snapshot. Its name goes first: what is half removed must not look whole.
func (s Store) Delete(tag string) error {
	if err := vm.CheckTag(tag); err != nil {
		return err
	}
	going := filepath.Join(s.dir, goingPrefix+tag)
	err := os.RemoveAll(going)
	if err == nil {
		err = os.Rename(filepath.Join(s.dir, tag), going)
	}
	if errors.Is(err, os.ErrNotExist) {
		return s.missing(tag)
	}
	if err == nil {
		err = os.RemoveAll(going)
	}
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot delete snapshot %s of VM %s", tag, s.vm)
	}
	return nil
}

// Sweep removes what was being made or removed when its maker died.
func (s Store) Sweep() error {
	entries, err := os.ReadDir(s.dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	for _, e := range entries {
		if strings.HasPrefix(e.Name(), makingPrefix) || strings.HasPrefix(e.Name(), goingPrefix) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(s.dir, e.Name())))
		}
	}
	return err
}
