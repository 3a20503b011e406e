// Package fileio looks at files before they are read, reads until a context ends, and waits until files are on stable storage.
package fileio

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"banger/internal/fault"
)

// Until returns a reader of r that fails with the context's error as soon as that has ended. A Read that is under way is
// not interrupted.
func Until(ctx context.Context, r io.Reader) io.Reader { return until{ctx, r} }

type until struct {
	ctx context.Context
	r   io.Reader
}

func (u until) Read(b []byte) (int, error) {
	if err := u.ctx.Err(); err != nil {
		return 0, err
	}
	return u.r.Read(b)
}

// Plain refuses what is no file, without opening it: the reading of a device or a pipe may never end, nor the opening of a
// pipe. A NotFound fault says that there is nothing, a Usage fault that it is something else.
func Plain(path string) (fs.FileInfo, error) {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fault.New(fault.NotFound, "there is no file %s", path)
	case err != nil:
		return nil, fault.Wrap(fault.Precondition, err, "cannot read %s", path)
	case !info.Mode().IsRegular():
		return nil, fault.New(fault.Usage, "%s is no file", path)
	}
	return info, nil
}

// Flush waits until a file, or the names in a directory, are on stable storage.
func Flush(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// FlushTree is Flush for dir and all files and directories below it.
func FlushTree(dir string) error {
	return filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.IsDir() && !d.Type().IsRegular() {
			return err
		}
		return Flush(path)
	})
}
