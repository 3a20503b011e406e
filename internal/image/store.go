// Package image makes and keeps images: a read-only root file system that many machines share, and
// the work seed that their work disks are cloned from, with a manifest of what is in them.
package image

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"
	"runtime"
	"slices"
	"time"

	"banger/internal/artifact"
	"banger/internal/fault"
)

// Files of an image's directory.
const (
	manifestName = "image.json"
	rootName     = "root.ext4"
	seedName     = "work-seed.ext4"
)

// Manifest is the content of image.json.
type Manifest struct {
	Name         string          `json:"name"`
	Aliases      []string        `json:"aliases,omitempty"` // other names that mean the newest image having them
	Digest       string          `json:"digest"`            // over the contents of Files
	Description  string          `json:"description"`
	Architecture string          `json:"architecture"`
	Suite        string          `json:"suite,omitempty"`
	Source       string          `json:"source,omitempty"`        // what was imported: a file's name, or a reference in full
	SourceDigest string          `json:"source_digest,omitempty"` // of the imported image's manifest
	Recipe       string          `json:"recipe"`                  // hash of how it was made; empty: it was imported
	Packages     []string        `json:"packages"`
	PackagesHash string          `json:"packages_hash"`
	MaskedUnits  *[]string       `json:"masked_units,omitempty"`
	Skipped      []string        `json:"skipped,omitempty"` // what could not be taken over, a line each
	Build        *Built          `json:"build,omitempty"`   // how it was built, of an image from a recipe
	Files        []artifact.File `json:"files"`
	CreatedAt    time.Time       `json:"created_at"`
}

// Image is an image ready for use. All paths are absolute.
type Image struct {
	Name          string // never means another content
	Digest        string // "sha256:" and 64 hex digits
	Description   string
	Architecture  string
	Dir           string
	Root          string   // read-only ext4
	WorkSeed      string   // ext4 of what is in /root, to be cloned; empty: the image has none
	RootBytes     int64    // size of Root
	WorkSeedBytes int64    // size of WorkSeed: the least a work disk can have
	Packages      []string // "name=version", sorted
	// MaskedUnits are the systemd units this image wants left out; nil: banger's own list.
	MaskedUnits *[]string
	Aliases     []string
	CreatedAt   time.Time
	Problem     string // why it cannot be used; only List returns such images
	Notice      string // what one should know of an image that works
	Manifest    Manifest
}

// Store holds images in a directory.
type Store struct {
	shelf *artifact.Shelf
	old   oldSums
}

// Open returns the store in dir, which need not be there yet.
func Open(dir string) *Store {
	return &Store{shelf: artifact.Open(dir, "image", manifestName)}
}

// List returns all images, sorted by name, also those with a Problem.
func (s *Store) List(ctx context.Context) ([]Image, error) {
	names, err := s.shelf.Names()
	if err != nil {
		return nil, err
	}
	var images []Image
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		i, err := s.load(name)
		if err != nil {
			i.Name, i.Dir, i.Problem = name, s.shelf.Dir(name), artifact.Problem(err)
		}
		images = append(images, i)
	}
	return images, nil
}

// Get returns an image whose files are all there and unchanged, by its name or an alias; "" is the
// default image. An unknown name is a NotFound fault, a damaged image a Precondition fault.
func (s *Store) Get(ctx context.Context, name string) (Image, error) {
	if err := ctx.Err(); err != nil {
		return Image{}, err
	}
	asked := name
	if name == "" {
		var err error
		if name, err = s.shelf.Default(); err != nil {
			return Image{}, err
		}
	}
	if name == "" {
		return Image{}, s.shelf.Missing(asked)
	}
	if s.shelf.Has(name) {
		return s.load(name)
	}
	images, err := s.List(ctx)
	if err != nil {
		return Image{}, err
	}
	var newest *Image
	for i := range images {
		if slices.Contains(images[i].Aliases, name) && (newest == nil || images[i].CreatedAt.After(newest.CreatedAt)) {
			newest = &images[i]
		}
	}
	if newest == nil {
		return Image{}, s.shelf.Missing(asked)
	}
	return *newest, nil
}

// Verify sums the whole content of an image's files.
func (s *Store) Verify(ctx context.Context, name string) error {
	i, err := s.Get(ctx, name)
	if err != nil {
		return err
	}
	return s.shelf.Verify(ctx, i.Name, i.Manifest.Files)
}

func (s *Store) load(name string) (Image, error) {
	var m Manifest
	dir := s.shelf.Dir(name)
	if err := s.shelf.ReadManifest(name, &m); err != nil {
		if errors.Is(err, fs.ErrNotExist) && isOld(dir) {
			return s.loadOld(name, m)
		}
		return Image{}, err
	}
	i := Image{
		Name: name, Digest: m.Digest, Description: m.Description, Architecture: m.Architecture, Dir: dir,
		Root: filepath.Join(dir, rootName), Packages: m.Packages,
		MaskedUnits: m.MaskedUnits, Aliases: m.Aliases, CreatedAt: m.CreatedAt, Manifest: m,
	}
	for _, f := range m.Files {
		switch f.Name {
		case rootName:
			i.RootBytes = f.Size
		case seedName:
			i.WorkSeed, i.WorkSeedBytes = filepath.Join(dir, seedName), f.Size
		}
	}
	if i.RootBytes == 0 && isOld(dir) {
		return s.loadOld(name, m)
	}
	if i.RootBytes == 0 {
		return Image{}, fault.New(fault.Precondition, "image %s is damaged: its manifest tells of no root file system", name).
			WithHint("delete it: banger image delete %s", name)
	}
	if m.Architecture != "" && m.Architecture != runtime.GOARCH {
		return Image{}, fault.New(fault.Precondition, "image %s is for %s, this machine is %s", name, m.Architecture, runtime.GOARCH).
			WithHint("delete it: banger image delete %s", name)
	}
	return i, s.shelf.Check(name, m.Files)
}
