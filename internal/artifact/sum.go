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
	err = eachBlock(f, size, func(at int64, block []byte) bool {
		number(at)
		_, _ = h.Write(block)
		return true
	})
	return hex.EncodeToString(h.Sum(nil)), size, err
}

// eachBlock calls visit with the blocks of a file that are not all zero, and their offsets, until that returns false.
func eachBlock(f *os.File, size int64, visit func(at int64, block []byte) bool) error {
	chunk, zero := make([]byte, 64*sparseBlock), make([]byte, sparseBlock)
	for at := int64(0); at < size; {
		data, err := unix.Seek(int(f.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return nil
		}
		if err == nil && data > at+sparseBlock {
			at = data &^ (sparseBlock - 1)
		}
		n, err := f.ReadAt(chunk, at)
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		for rest := chunk[:n]; len(rest) > 0; {
			block := rest[:min(sparseBlock, len(rest))]
			if !bytes.Equal(block, zero[:len(block)]) && !visit(at, block) {
				return nil
			}
			rest, at = rest[len(block):], at+int64(len(block))
		}
		if n == 0 { // it became shorter
			return io.ErrUnexpectedEOF
		}
	}
	return nil
}

// mostlyZero tells whether more than half of a file is zeros, whether its file system keeps them as holes or not.
func mostlyZero(path string) (bool, error) {
	f, err := os.Open(path)
	if err != nil {
		return false, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return false, err
	}
	left := info.Size() / 2
	err = eachBlock(f, info.Size(), func(_ int64, block []byte) bool {
		left -= int64(len(block))
		return left > 0
	})
	return left > 0, err
}

func sumLike(path string, sparse bool) (string, int64, error) {
	if sparse {
		return SparseSum(path)
	}
	return Sum(path)
}
