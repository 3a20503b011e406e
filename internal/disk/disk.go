// Package disk makes the files that machines use as disks: clones that share or skip what is not
// there, empty ext4 file systems, and compact read-only ones written from a tar stream. It needs
// no root right and no loop device. A file appears under its name only when it is whole.
package disk

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
)

// temporaryPrefix begins the name of every file that is not whole yet.
const temporaryPrefix = ".new-"

// FreeBytes returns how many bytes an unprivileged user may still write to the file system of dir.
func FreeBytes(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return 0, fault.Wrap(fault.Unexpected, err, "cannot tell the free space of %s", dir)
	}
	return int64(st.Bavail) * st.Bsize, nil
}

// RequireFree finds a disk too full for what is to come: a Precondition fault when less than bytes are
// free in dir. what says what the space is for.
func RequireFree(dir string, bytes int64, what string) error {
	free, err := FreeBytes(dir)
	if err != nil || free >= bytes {
		return err
	}
	return fault.New(fault.Precondition, "disk full: %s needs %d MB in %s, %d MB are free", what, bytes/1_000_000, dir, free/1_000_000).
		WithHint("free some space there")
}

// AllocatedBytes returns the space that a file takes on its disk, holes not counted.
func AllocatedBytes(path string) (int64, error) {
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		return 0, fault.Wrap(fault.Unexpected, err, "cannot tell the size of %s", path)
	}
	return st.Blocks * 512, nil
}

// atomically has f fill a new file with mode 0600 in the directory of path, and gives it that
// name when f succeeds. Otherwise nothing stays. The data is not flushed to stable storage: what
// a guest flushes later takes the rest of the file along.
func atomically(path string, f func(temporary *os.File) error) (err error) {
	t, err := os.CreateTemp(filepath.Dir(path), temporaryPrefix+"*")
	if err != nil {
		return spaceFault(err, path)
	}
	defer func() {
		err = errors.Join(err, t.Close())
		if err != nil {
			err = errors.Join(spaceFault(err, path), os.Remove(t.Name()))
		}
	}()
	if err := f(t); err != nil {
		return err
	}
	return os.Rename(t.Name(), path)
}

// spaceFault turns the errors of a full disk into a fault that says so.
func spaceFault(err error, path string) error {
	if !isFull(err) {
		return err
	}
	return fault.Wrap(fault.Precondition, err, "disk full while writing %s", path).
		WithHint("free some space in %s, for instance by deleting VMs you no longer need", whereRoom(path))
}

func isFull(err error) bool {
	return errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// whereRoom is the directory in which room has to be made for a file: not the one that goes when what is made in it fails.
func whereRoom(path string) string {
	dir := filepath.Dir(path)
	if strings.HasPrefix(filepath.Base(dir), temporaryPrefix) {
		return filepath.Dir(dir)
	}
	return dir
}
