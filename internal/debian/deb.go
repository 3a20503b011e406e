package debian

import (
	"archive/tar"
	"bufio"
	"bytes"
	"compress/bzip2"
	"context"
	"errors"
	"io"
	"os"
	"strings"

	"github.com/blakesmith/ar"
	"github.com/klauspost/compress/gzip"
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
	return member(file, path, "data.tar", func(packed io.Reader) error { return walkData(ctx, path, packed, f) })
}

// member finds a part of a package by the beginning of its name (deb(5)).
func member(file io.Reader, path, prefix string, f func(io.Reader) error) error {
	archive := ar.NewReader(bufio.NewReaderSize(file, 1<<20))
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return fault.New(fault.Precondition, "package %s holds no %s", path, prefix)
		}
		if err != nil {
			return fault.Wrap(fault.Precondition, err, "package %s is damaged", path)
		}
		if strings.HasPrefix(h.Name, prefix) {
			return f(archive)
		}
	}
}

// maxControl bounds the control file of a package.
const maxControl = 1 << 20

// ReadControl returns what a package on this host says about itself.
func ReadControl(path string) (p Package, err error) {
	file, err := os.Open(path)
	if err != nil {
		return p, fault.Wrap(fault.Precondition, err, "cannot open package %s", path)
	}
	defer func() { _ = file.Close() }()
	err = member(file, path, "control.tar", func(packed io.Reader) error {
		return walkData(context.Background(), path, packed, func(h *tar.Header, content io.Reader) error {
			if h.Name != "control" {
				return nil
			}
			text, err := io.ReadAll(io.LimitReader(content, maxControl))
			for line := range strings.Lines(string(text)) {
				name, value, _ := strings.Cut(strings.TrimSpace(line), ": ")
				switch name {
				case "Package":
					p.Name = value
				case "Version":
					p.Version = value
				case "Architecture":
					p.Architecture = value
				}
			}
			return err
		})
	})
	if err == nil && p.Name == "" {
		err = fault.New(fault.Precondition, "package %s does not say its name", path)
	}
	return p, err
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
		if err := f(h, damagedReader{entries, path}); err != nil {
			return err
		}
	}
}

// damagedReader tells a package that cannot be read from a disk that cannot be written.
type damagedReader struct {
	io.Reader
	path string
}

func (d damagedReader) Read(b []byte) (int, error) {
	n, err := d.Reader.Read(b)
	if err != nil && !errors.Is(err, io.EOF) {
		err = fault.Wrap(fault.Precondition, err, "package %s is damaged", d.path)
	}
	return n, err
}

// packings are the formats that Decompress undoes, by their first bytes.
var packings = []struct {
	magic string
	open  func(io.Reader) (io.ReadCloser, error)
}{
	{"\xfd7zXZ\x00", func(r io.Reader) (io.ReadCloser, error) {
		x, err := xz.NewReader(r)
		return io.NopCloser(x), err
	}},
	{"\x28\xb5\x2f\xfd", func(r io.Reader) (io.ReadCloser, error) {
		z, err := zstd.NewReader(r, zstd.WithDecoderMaxMemory(maxWindow), zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	}},
	{"\x1f\x8b", func(r io.Reader) (io.ReadCloser, error) { return gzip.NewReader(r) }},
	{"BZh", func(r io.Reader) (io.ReadCloser, error) { return io.NopCloser(bzip2.NewReader(r)), nil }},
}

// Packed tells whether a stream that begins with head is one that Decompress undoes.
func Packed(head []byte) bool {
	for _, p := range packings {
		if bytes.HasPrefix(head, []byte(p.magic)) {
			return true
		}
	}
	return false
}

// Decompress reads a stream packed with xz, zstd, gzip or bzip2, told apart by their first bytes, or one
// not packed at all.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 64<<10)
	head, err := b.Peek(6)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	for _, p := range packings {
		if bytes.HasPrefix(head, []byte(p.magic)) {
			return p.open(b)
		}
	}
	return io.NopCloser(b), nil
}
