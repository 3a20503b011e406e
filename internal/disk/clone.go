package disk

import (
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
)

// copyChunk bounds what is copied between two looks at the context.
const copyChunk = 64 << 20

// CloneFile makes dst a copy of src, sharing its blocks where the file system can (FICLONE) and
// otherwise copying only what is not a hole. dst gets mode 0600.
func CloneFile(ctx context.Context, dst, src string) error {
	from, err := os.Open(src)
	if errors.Is(err, os.ErrNotExist) {
		return fault.Wrap(fault.NotFound, err, "cannot clone %s", src)
	}
	if err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot clone %s", src)
	}
	defer func() { _ = from.Close() }()
	return atomically(dst, func(to *os.File) error { return cloneInto(ctx, to, from) })
}

func cloneInto(ctx context.Context, to, from *os.File) error {
	err := unix.IoctlFileClone(int(to.Fd()), int(from.Fd()))
	if err == nil {
		return nil
	}
	for _, cannot := range []error{unix.EOPNOTSUPP, unix.EXDEV, unix.EINVAL, unix.ENOTTY, unix.ENOSYS} {
		if errors.Is(err, cannot) {
			return copySparse(ctx, to, from)
		}
	}
	return err
}

// copySparse copies the data extents of from and gives to the same length.
func copySparse(ctx context.Context, to, from *os.File) error {
	info, err := from.Stat()
	if err != nil {
		return err
	}
	size := info.Size()
	if err := to.Truncate(size); err != nil {
		return err
	}
	for at := int64(0); at < size; {
		start, end, err := nextData(from, at, size)
		if err != nil || start == size {
			return err
		}
		if err := copyRange(ctx, to, from, start, end); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// nextData returns the next extent with data at or after at; start is size when there is none.
func nextData(f *os.File, at, size int64) (start, end int64, err error) {
	start, err = unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
	if errors.Is(err, unix.ENXIO) {
		return size, size, nil
	}
	if errors.Is(err, unix.EINVAL) { // the file system knows no holes: all is data
		return at, size, nil
	}
	if err != nil {
		return 0, 0, err
	}
	end, err = unix.Seek(int(f.Fd()), start, unix.SEEK_HOLE)
	return start, min(end, size), err
}

func copyRange(ctx context.Context, to, from *os.File, start, end int64) error {
	for at := start; at < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		in, out := at, at
		n, err := unix.CopyFileRange(int(from.Fd()), &in, int(to.Fd()), &out, int(min(end-at, copyChunk)), 0)
		switch {
		case errors.Is(err, unix.EXDEV), errors.Is(err, unix.EINVAL), errors.Is(err, unix.EOPNOTSUPP), errors.Is(err, unix.ENOSYS):
			return copyByHand(ctx, to, from, at, end)
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return err
		case n == 0: // the source became shorter under our hands
			return io.ErrUnexpectedEOF
		}
		at += int64(n)
	}
	return nil
}

func copyByHand(ctx context.Context, to, from *os.File, start, end int64) error {
	for at := start; at < end; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n := min(end-at, copyChunk)
		if _, err := io.Copy(io.NewOffsetWriter(to, at), io.NewSectionReader(from, at, n)); err != nil {
			return err
		}
		at += n
	}
	return nil
}
