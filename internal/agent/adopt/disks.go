package adopt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// ioctls of linux/fs.h: _IOWR('X', 119, int) and _IOWR('X', 120, int).
const (
	ioctlFreeze = 0xc0045877
	ioctlThaw   = 0xc0045878
)

// diskWait is how long a file system may take to stand still, or to go on.
const diskWait = 5 * time.Second

// writableExt4 returns the block size, in bytes, of the ext4 on dir when it is written to; 0 when dir is on nothing of
// the kind.
func writableExt4(dir string) (blockSize int64, err error) {
	var st unix.Statfs_t
	err = unix.Statfs(dir, &st)
	if errors.Is(err, fs.ErrNotExist) || err == nil && (st.Type != unix.EXT4_SUPER_MAGIC || st.Flags&unix.ST_RDONLY != 0) {
		return 0, nil
	}
	return st.Bsize, err
}

// writable opens those of the directories that are on writable disks, one for each disk.
func writable(dirs []string) (files []*os.File, err error) {
	var devices []uint64
	for _, dir := range dirs {
		blockSize, err := writableExt4(dir)
		if err != nil {
			return closeAll(files), err
		}
		var st unix.Stat_t
		if blockSize == 0 || unix.Stat(dir, &st) != nil || slices.Contains(devices, st.Dev) {
			continue
		}
		f, err := os.Open(dir)
		if err != nil {
			return closeAll(files), err
		}
		files, devices = append(files, f), append(devices, st.Dev)
	}
	return files, nil
}

func closeAll(files []*os.File) []*os.File {
	for _, f := range files {
		_ = f.Close() // only opened
	}
	return nil
}

// freezeDisks lets the file systems stand still: what is on their disks is whole without a journal. frozen are those that
// do, also beside an error; why says why others do not. One that the user froze is left to the user. A disk that does not
// answer is an error.
func freezeDisks(ctx context.Context, dirs []string) (frozen []*frozenDisk, why string, err error) {
	files, err := writable(dirs)
	if err != nil {
		return nil, "", err
	}
	var lacking []string
	for i, f := range files {
		err := within(ctx, func() error { return ioctl(f, ioctlFreeze, nil) }, func() { _ = ioctl(f, ioctlThaw, nil); _ = f.Close() })
		switch {
		case err == nil:
			frozen = append(frozen, newFrozenDisk(f))
			continue
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled):
			// f is closed when the kernel is done with it.
			closeAll(files[i+1:])
			return frozen, "", fmt.Errorf("the file system on %s does not come to rest: %w", f.Name(), err)
		case !errors.Is(err, unix.EBUSY):
			lacking = append(lacking, fmt.Sprintf("%s: %v", f.Name(), err))
		}
		_ = f.Close() // only opened
	}
	return frozen, strings.Join(lacking, "; "), nil
}

// frozenDisk is a file system that stands still.
type frozenDisk struct {
	file   *os.File
	letGo  func() error
	answer chan error // the kernel's, who was told to let it go on; nil: it was not, or has answered
}

func newFrozenDisk(f *os.File) *frozenDisk {
	return &frozenDisk{file: f, letGo: func() error { return ioctl(f, ioctlThaw, nil) }}
}

// thaw lets it go on. One that goes on already is no error. The kernel is told once, however often a dead disk is tried.
func (d *frozenDisk) thaw() error {
	if d.answer == nil {
		answer := make(chan error, 1)
		go func() { answer <- d.letGo() }()
		d.answer = answer
	}
	select {
	case err := <-d.answer:
		d.answer = nil
		if err != nil && !errors.Is(err, unix.EINVAL) {
			return fmt.Errorf("let the file system on %s go on: %w", d.file.Name(), err)
		}
		_ = d.file.Close() // only opened
		return nil
	case <-time.After(diskWait):
		return fmt.Errorf("the file system on %s does not go on: %w", d.file.Name(), context.DeadlineExceeded)
	}
}

// thawDisks lets file systems go on, the last one that was frozen first. left are those that do not.
func thawDisks(disks []*frozenDisk) (left []*frozenDisk, err error) {
	for _, d := range slices.Backward(disks) {
		if stuck := d.thaw(); stuck != nil {
			left, err = append(left, d), errors.Join(err, stuck)
		}
	}
	slices.Reverse(left)
	return left, err
}

// within calls f, which a dead disk may hold up in the kernel, and waits for diskWait at most. When f returns only after
// that, late takes back what it did.
func within(ctx context.Context, f func() error, late func()) error {
	ctx, cancel := context.WithTimeout(ctx, diskWait)
	defer cancel()
	done := make(chan error)
	go func() {
		err := f()
		select {
		case done <- err:
		case <-ctx.Done():
			late()
		}
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}
