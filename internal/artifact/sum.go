package artifact

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"io"
	"os"

	"golang.org/x/sys/unix"
)

const sparseBlock = 4096

// Sum returns the SHA-256 of a file in hex, and its size in bytes.
func Sum(path string) (sum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer func() { _ = f.Close() }()
	h := sha256.New()
	size, err = io.Copy(h, f)
	return hex.EncodeToString(h.Sum(nil)), size, err
}

// SparseSum returns a SHA-256 over the size of a file and over its blocks of 4 KiB that are not all
// zero, each behind its offset. It takes time for the data only, and does not depend on where the holes are.
func SparseSum(path string) (sum string, size int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return "", 0, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return "", 0, err
	}
	size = info.Size()
	h := sha256.New()
	number := func(n int64) { _, _ = h.Write(binary.LittleEndian.AppendUint64(nil, uint64(n))) } // a hash never fails
	number(size)
	block, zero := make([]byte, sparseBlock), make([]byte, sparseBlock)
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			break
		}
		if err == nil && data > at+sparseBlock {
			at = data &^ (sparseBlock - 1)
		}
		n, err := f.ReadAt(block, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return "", 0, err
		}
		if !bytes.Equal(block[:n], zero[:n]) {
			number(at)
			_, _ = h.Write(block[:n])
		}
		at += sparseBlock
	}
	return hex.EncodeToString(h.Sum(nil)), size, nil
}

func sumLike(path string, sparse bool) (string, int64, error) {
	if sparse {
		return SparseSum(path)
	}
	return Sum(path)
}
