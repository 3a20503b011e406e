package debian

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"os"
	"strings"

	"github.com/blakesmith/ar"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"banger/internal/fault"
)

const maxWindow = 128 << 20 // bytes of memory a zstd stream may ask for

// WalkDeb calls f for each entry of the files of a .deb package, in its order. The reader is valid
// until f returns. Names in the header are clean and relative: "usr/bin/ls".
func WalkDeb(ctx context.Context, path string, f func(h *tar.Header, content io.Reader) error) error {
	file, err := os.Open(path)
	if err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot open package %s", path)
	}
	defer func() { _ = file.Close() }()
	archive := ar.NewReader(bufio.NewReaderSize(file, 1<<20))
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return fault.New(fault.Precondition, "package %s holds no files", path)
		}
		if err != nil {
			return fault.Wrap(fault.Precondition, err, "package %s is damaged", path)
		}
		if strings.HasPrefix(h.Name, "data.tar") {
			return walkData(ctx, path, archive, f)
		}
	}
}

func walkData(ctx context.Context, path string, packed io.Reader, f func(*tar.Header, io.Reader) error) error {
	data, err := Decompress(packed)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "package %s is damaged", path)
	}
	defer func() { _ = data.Close() }()
	entries := tar.NewReader(data)
	for {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := entries.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fault.Wrap(fault.Precondition, err, "package %s is damaged", path)
		}
		h.Name = strings.Trim(strings.TrimPrefix(h.Name, "./"), "/")
		if err := f(h, entries); err != nil {
			return err
		}
	}
}

// Decompress reads a stream packed with xz, zstd or gzip, told apart by their first bytes, or one
// not packed at all.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte("\xfd7zXZ\x00")):
		x, err := xz.NewReader(b)
		return io.NopCloser(x), err
	case bytes.HasPrefix(magic, []byte("\x28\xb5\x2f\xfd")):
		z, err := zstd.NewReader(b, zstd.WithDecoderMaxMemory(maxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case bytes.HasPrefix(magic, []byte("\x1f\x8b")):
		return gzip.NewReader(b)
	}
	return io.NopCloser(b), nil
}
