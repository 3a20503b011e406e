package image

import (
	"context"
	"errors"
	"io/fs"
	"slices"

	"banger/internal/fault"
)

// SetDefault makes an image the one that VMs get which name none.
func (s *Store) SetDefault(ctx context.Context, name string) (Image, error) {
	i, err := s.Get(ctx, name)
	if err != nil {
		return i, err
	}
	return i, s.shelf.SetDefault(i.Name)
}

// Delete removes an image, also a damaged one. used tells why it cannot go, or nil; it is asked before, and again while the
// image is out of the way. The default image is not deleted.
func (s *Store) Delete(ctx context.Context, name string, used func(name string) error) error {
	name, err := s.exact(ctx, name)
	if err != nil {
		return err
	}
	def, err := s.shelf.Default()
	if err != nil {
		return err
	}
	if def == name {
		return fault.New(fault.Conflict, "image %s is the default image", name).
			WithHint("make another one the default first: banger image default NAME")
	}
	return s.shelf.Delete(name, func() error { return used(name) })
}

// exact returns the name of an image that is called by its name or an alias, whole or damaged.
func (s *Store) exact(ctx context.Context, name string) (string, error) {
	if name == "" {
		return "", fault.New(fault.Usage, "the request names no image")
	}
	if s.shelf.Has(name) {
		return name, nil
	}
	i, err := s.Get(ctx, name)
	return i.Name, err
}

// Rename gives an image another name; used is asked as Delete asks it.
func (s *Store) Rename(ctx context.Context, name, to string, used func(name string) error) (Image, error) {
	if err := checkName(to); err != nil {
		return Image{}, err
	}
	i, err := s.Get(ctx, name)
	if err != nil {
		return i, err
	}
	m := i.Manifest
	m.Name, m.Aliases = to, slices.DeleteFunc(slices.Clone(m.Aliases), func(a string) bool { return a == to })
	if err := s.shelf.Rename(i.Name, to, m, func() error { return used(i.Name) }); err != nil {
		return Image{}, err
	}
	if def, err := s.shelf.Default(); err == nil && def == i.Name {
		if err := s.shelf.SetDefault(to); err != nil {
			return Image{}, err
		}
	}
	return s.Get(ctx, to)
}

// Reconcile looks after the default image, and returns what it did and what is wrong, a line each.
func (s *Store) Reconcile() []string {
	return s.shelf.Reconcile(func(name string) error {
		err := s.shelf.Present(name)
		if err != nil && isOld(s.shelf.Dir(name)) {
			var m Manifest
			if mErr := s.shelf.ReadManifest(name, &m); errors.Is(mErr, fs.ErrNotExist) || mErr == nil && len(m.Files) == 0 {
				return nil
			}
		}
		return err
	})
}
