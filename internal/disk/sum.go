package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

// sumBlock is the unit of Sum, in bytes.
const sumBlock = 64 << 10

var (
	castagnoli = crc32.MakeTable(crc32.Castagnoli)
	zeroBlock  [sumBlock]byte
)

// Sum returns a checksum of a file's content, for finding damage: a CRC-32C of its size and of each block that is not all
// zeros, with its place. Where a file system keeps zeros as holes makes no difference. Only what is data is read.
func Sum(ctx context.Context, path string) (uint32, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	size := info.Size()
	sum := addNumber(0, size)
	buf := make([]byte, sumBlock)
	for at := int64(0); at < size; {
		start, end, err := nextData(f, at, size)
		if err != nil {
			return 0, err
		}
		for at = max(at, start/sumBlock*sumBlock); at < end; at += sumBlock {
			if err := ctx.Err(); err != nil {
				return 0, err
			}
			n, err := f.ReadAt(buf, at)
			if err != nil && !errors.Is(err, io.EOF) {
				return 0, err
			}
			if block := buf[:n]; !bytes.Equal(block, zeroBlock[:n]) {
				sum = crc32.Update(addNumber(sum, at), castagnoli, block)
			}
		}
	}
	return sum, nil
}

func addNumber(sum uint32, n int64) uint32 {
	return crc32.Update(sum, castagnoli, binary.LittleEndian.AppendUint64(nil, uint64(n)))
}

// Mark tells a file as it is from the same file after somebody has written to it, and from a copy: also when its time of
// modification was set back. It says nothing on another host, or after the file was copied.
type Mark struct {
	Device, Inode     uint64
	Size              int64
	Modified, Changed unix.Timespec
}

// MarkOf returns the mark of a file.
func MarkOf(path string) (Mark, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return Mark{}, &os.PathError{Op: "lstat", Path: path, Err: err}
	}
	return Mark{Device: uint64(st.Dev), Inode: st.Ino, Size: st.Size, Modified: st.Mtim, Changed: st.Ctim}, nil
}
