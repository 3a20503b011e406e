package disk

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// digBlock is what Dig looks at and gives back at a time, in bytes: several blocks of any file system.
const digBlock = 64 << 10

// Dig makes holes of what is zero in a file: the same to read, and not on the disk. Where the file system has no
// holes it does nothing.
func Dig(ctx context.Context, path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	for at, size := int64(0), info.Size(); at < size; {
		if at, err = digNext(ctx, f, at, size); errors.Is(err, unix.EOPNOTSUPP) {
			return nil
		} else if err != nil {
			return err
		}
	}
	return nil
}

// digNext digs in the next extent with data at or after at, and returns its end.
func digNext(ctx context.Context, f *os.File, at, size int64) (int64, error) {
	start, end, err := nextData(f, at, size)
	if err != nil {
		return at, err
	}
	buf, zero := make([]byte, digBlock), make([]byte, digBlock)
	// Whole blocks of the file, wherever the data begins.
	for at := start / digBlock * digBlock; at < end; at += digBlock {
		if err := ctx.Err(); err != nil {
			return at, err
		}
		n, err := f.ReadAt(buf, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return at, err
		}
		if n == 0 || !bytes.Equal(buf[:n], zero[:n]) {
			continue
		}
		if err := unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, at, int64(n)); err != nil {
			return at, err
		}
	}
	return end, nil
}
