package template

import (
	"context"
	"errors"
	"io/fs"
	"path/filepath"

	"banger/internal/disk"
	"banger/internal/fault"
)

// smallFile is the size in bytes up to which a file's content is looked at whenever its template is used.
const smallFile = 1 << 20

// Verify reads a template's files and compares them with the manifest: size and time alone do not tell of damage. What it
// found whole once it does not read again as long as the files' marks stay the same, except for small files. A Precondition
// fault says what is damaged, a NotFound fault that the template was removed meanwhile.
func (s *Store) Verify(ctx context.Context, t Template) error {
	select { // one at a time: five creates at once have it read once
	case s.verifying <- struct{}{}:
		defer func() { <-s.verifying }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for _, f := range t.Files {
		err := s.verify(ctx, filepath.Join(t.Dir, f.Name), f)
		switch {
		case err == nil:
		case ctx.Err() != nil:
			return context.Cause(ctx)
		case errors.Is(err, fs.ErrNotExist):
			return missing(t.Key)
		case errors.Is(err, errDiffers):
			return damaged(t.Key, nil, "the content of file %s has changed", f.Name)
		default:
			return damaged(t.Key, err, "file %s cannot be read", f.Name)
		}
	}
	return nil
}

var errDiffers = fault.New(fault.Precondition, "its checksum differs")

// verify compares the content of one file with what the manifest says of it.
func (s *Store) verify(ctx context.Context, path string, f File) error {
	before, err := disk.MarkOf(path)
	if err != nil {
		return err
	}
	if f.Size > smallFile && s.whole(path) == before {
		return nil
	}
	sum, err := disk.Sum(ctx, path)
	if err != nil {
		return err
	}
	if sum != f.CRC32C {
		return errDiffers
	}
	s.remember(path, before)
	return nil
}

// whole returns the mark that a file had when its content was last found to be right.
func (s *Store) whole(path string) disk.Mark {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.marks[path]
}

// remember notes that a file with that mark, taken before it was read, is whole. Whoever wrote to it meanwhile gave it
// another one.
func (s *Store) remember(path string, m disk.Mark) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.marks == nil {
		s.marks = map[string]disk.Mark{}
	}
	s.marks[path] = m
}

// forget drops what is remembered of a template that goes.
func (s *Store) forget(key string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for path := range s.marks {
		if filepath.Dir(path) == s.Dir(key) {
			delete(s.marks, path)
		}
	}
}
