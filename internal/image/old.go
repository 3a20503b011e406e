package image

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"banger/internal/artifact"
	"banger/internal/fault"
)

// oldRoots are the names that the root file system of an image of an older layout may have.
var oldRoots = []string{rootName, "rootfs.ext4", "root.img", "rootfs.img"}

// oldSums remembers the checksums of images of an older layout, which no manifest tells.
type oldSums struct {
	mu   sync.Mutex
	sums map[string]artifact.File // by path
}

// loadOld loads an image of an older layout: a root file system, and perhaps a manifest that tells of other things
// than ours. It has no work seed and no list of packages.
func (s *Store) loadOld(name string, m Manifest) (Image, error) {
	dir := s.shelf.Dir(name)
	file := oldRoot(dir)
	f, err := s.old.describe(dir, file)
	if err != nil {
		return Image{}, fault.Wrap(fault.Precondition, err, "image %s cannot be read", name)
	}
	i := Image{
		Name: name, Digest: artifact.Digest([]artifact.File{f}), Description: m.Description, Architecture: m.Architecture,
		Dir: dir, Root: filepath.Join(dir, file), RootBytes: f.Size, Aliases: m.Aliases, CreatedAt: m.CreatedAt, Manifest: m,
		Notice: "it is of an older layout: VMs of it begin with an empty /root, and its packages are not known; " +
			"banger setup --rebuild makes a new default image",
	}
	i.Manifest.Files = []artifact.File{f}
	if i.CreatedAt.IsZero() {
		i.CreatedAt = time.Unix(0, f.ModTime)
	}
	return i, nil
}

// isOld tells whether a directory, whose manifest tells of no files of ours or is not there, holds an image of an older layout.
// One with a work seed is of this layout, and damaged.
func isOld(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, seedName))
	return errors.Is(err, fs.ErrNotExist) && oldRoot(dir) != ""
}

// oldRoot returns the name of the root file system in a directory of an older layout, or "".
func oldRoot(dir string) string {
	for _, file := range oldRoots {
		info, err := os.Stat(filepath.Join(dir, file))
		if err == nil && info.Mode().IsRegular() && info.Size() > 0 {
			return file
		}
	}
	return ""
}

// describe sums a file up, once as long as it does not change.
func (o *oldSums) describe(dir, file string) (artifact.File, error) {
	path := filepath.Join(dir, file)
	info, err := os.Stat(path)
	if err != nil {
		return artifact.File{}, err
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if f, ok := o.sums[path]; ok && f.Size == info.Size() && f.ModTime == info.ModTime().UnixNano() {
		return f, nil
	}
	described, err := artifact.Describe(dir, file)
	if err != nil {
		return artifact.File{}, err
	}
	if o.sums == nil {
		o.sums = map[string]artifact.File{}
	}
	o.sums[path] = described[0]
	return described[0], nil
}
