// Package archive packs directories into compressed tar files and unpacks such files that come from elsewhere: nothing is
// written outside of the directory, and what an archive may hold is bounded.
package archive

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"unicode"
	"unicode/utf8"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"

	"banger/internal/fault"
	"banger/internal/fileio"
)

// Limits bound what is unpacked. The zero value of a field means its default.
type Limits struct {
	Bytes int64                  // of all files together, holes counted
	Files int                    // entries of any kind
	Want  func(name string) bool // which files are written; nil: all. Others are read over, and checked like these
}

// The default limits.
const (
	DefaultBytes = 64 << 30
	DefaultFiles = 10_000

	maxName     = 1024     // bytes of a whole name
	maxWindow   = 64 << 20 // bytes of memory that zstd may ask for
	trailer     = 1 << 20  // bytes behind the end of the tar stream that are read, for the checksum of the compression
	sparseBlock = 64 << 10
)

// Unpack writes the tar stream in r, compressed with gzip or zstd or not at all, into the directory dir. Files get mode 0644
// or, when their owner may execute them, 0755; owners and times are not taken over. Links are taken when they stay inside;
// devices are refused, and so is a name that occurs twice. Whatever is wrong with the archive is a Precondition fault; then dir holds
// what came before it, and the caller removes it.
func Unpack(ctx context.Context, r io.Reader, dir string, l Limits) error {
	if l.Bytes == 0 {
		l.Bytes = DefaultBytes
	}
	if l.Files == 0 {
		l.Files = DefaultFiles
	}
	plain, done, err := decompress(fileio.Until(ctx, r))
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	if err != nil {
		return err
	}
	defer done()
	root, err := os.OpenRoot(dir)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot unpack into %s", dir)
	}
	u := &unpacker{root: root, left: l.Bytes, limits: l}
	err = u.all(plain)
	if err == nil {
		_, err = io.CopyN(io.Discard, plain, trailer)
		if errors.Is(err, io.EOF) {
			err = nil
		}
		err = damaged(err)
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return errors.Join(err, root.Close())
}

// decompress tells the form by its first bytes.
func decompress(r io.Reader) (io.Reader, func(), error) {
	b := bufio.NewReaderSize(r, 64<<10)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, damaged(err)
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		z, err := gzip.NewReader(b)
		if err != nil {
			return nil, nil, damaged(err)
		}
		return z, func() { _ = z.Close() }, nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(b, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, nil, damaged(err)
		}
		return z, z.Close, nil
	case bytes.HasPrefix(magic, []byte("\xfd7zX")) || bytes.HasPrefix(magic, []byte("BZh")):
		return nil, nil, fault.New(fault.Precondition, "the archive is compressed with xz or bzip2").WithHint("use gzip or zstd")
	}
	return b, func() {}, nil
}

func damaged(err error) error {
	var known *fault.Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return fault.New(fault.Precondition, "the archive ends too early").WithHint("fetch it again")
	}
	return fault.Wrap(fault.Precondition, err, "the archive is damaged").WithHint("fetch it again")
}

type unpacker struct {
	root   *os.Root
	left   int64 // bytes
	count  int
	links  []string // symbolic ones
	limits Limits
}

func (u *unpacker) all(r io.Reader) error {
	t := tar.NewReader(r)
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return damaged(err)
		}
		if u.count++; u.count > u.limits.Files {
			return fault.New(fault.Precondition, "the archive has more than %d entries", u.limits.Files)
		}
		if h.Typeflag == tar.TypeXGlobalHeader {
			continue // no file: git says there what it packed
		}
		if err := u.entry(h, t); err != nil {
			return err
		}
	}
	if u.count == 0 {
		return fault.New(fault.Precondition, "the archive is empty, or no tar file")
	}
	return u.follow()
}

// follow refuses links that lead out by way of other links, which their letters do not tell, and those that lead nowhere.
func (u *unpacker) follow() error {
	for _, name := range u.links {
		if _, err := u.root.Stat(name); err != nil {
			return fault.Wrap(fault.Precondition, err, "the archive holds the link %q, which leads nowhere in it", name)
		}
	}
	return nil
}

func (u *unpacker) entry(h *tar.Header, r io.Reader) error {
	name, err := checkName(h.Name)
	if err != nil || name == "." {
		return err
	}
	if u.left -= h.Size; h.Size < 0 || u.left < 0 {
		return fault.New(fault.Precondition, "the archive holds more than %d bytes", u.limits.Bytes)
	}
	if err := checkType(h, name); err != nil {
		return err
	}
	if u.limits.Want != nil && !u.limits.Want(name) {
		return nil
	}
	if err := u.root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return entryFault(err, path.Dir(name))
	}
	switch h.Typeflag {
	case tar.TypeDir:
		err = u.root.MkdirAll(name, 0o755)
	case tar.TypeReg:
		err = u.file(name, h, r)
	case tar.TypeSymlink:
		err = u.root.Symlink(h.Linkname, name)
		u.links = append(u.links, name)
	case tar.TypeLink:
		err = u.hardLink(h.Linkname, name)
	}
	return entryFault(err, name)
}

// checkName refuses names that lead out, and those that cannot be told in a line.
func checkName(name string) (string, error) {
	switch {
	case len(name) > maxName:
		return "", fault.New(fault.Precondition, "the archive holds a name of %d bytes, the most is %d", len(name), maxName)
	case !utf8.ValidString(name) || strings.ContainsFunc(name, unicode.IsControl):
		return "", fault.New(fault.Precondition, "the archive holds the name %q, with characters that names of files here do not have", name)
	case path.IsAbs(name) || !filepath.IsLocal(path.Clean(name)):
		return "", fault.New(fault.Precondition, "the archive holds %q, which leads out of its directory", name)
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", fault.New(fault.Precondition, "the archive holds %q, which leads out of its directory", name)
		}
	}
	return path.Clean(name), nil
}

func checkType(h *tar.Header, name string) error {
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeDir:
		return nil
	case tar.TypeSymlink:
		target := path.Join(path.Dir(name), h.Linkname)
		if path.IsAbs(h.Linkname) || !filepath.IsLocal(target) {
			return fault.New(fault.Precondition, "the archive holds the link %q to %q, which leads out of its directory", name, h.Linkname)
		}
		return nil
	case tar.TypeLink:
		_, err := checkName(h.Linkname)
		return err
	}
	return fault.New(fault.Precondition, "the archive holds %q, which is neither a file nor a directory nor a link (type %q)", name, h.Typeflag)
}

// hardLink refuses what is no file unpacked before: a link to a symbolic link would be another name for where that leads.
func (u *unpacker) hardLink(target, name string) error {
	info, err := u.root.Lstat(path.Clean(target))
	if err == nil && !info.Mode().IsRegular() {
		return fault.New(fault.Precondition, "the archive holds the link %q to %q, which is no file", name, target)
	}
	if err != nil {
		return err
	}
	return u.root.Link(path.Clean(target), name)
}

func (u *unpacker) file(name string, h *tar.Header, r io.Reader) (err error) {
	mode := fs.FileMode(0o644)
	if h.Mode&0o100 != 0 {
		mode = 0o755
	}
	// O_EXCL follows no link and finds names that occur twice.
	f, err := u.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, mode)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := copySparse(f, r); err != nil {
		return err
	}
	return f.Chmod(mode) // whatever the umask
}

// copySparse leaves holes where blocks hold nothing but zeros, as most of a disk image does.
func copySparse(f *os.File, r io.Reader) error {
	block, zero := make([]byte, sparseBlock), make([]byte, sparseBlock)
	for size := int64(0); ; {
		n, err := fill(r, block)
		if !bytes.Equal(block[:n], zero[:n]) {
			if _, err := f.WriteAt(block[:n], size); err != nil {
				return err
			}
		}
		size += int64(n)
		if errors.Is(err, io.EOF) {
			return f.Truncate(size)
		}
		if err != nil {
			return damaged(err)
		}
	}
}

// fill reads until b is full or r ends. Unlike io.ReadFull it leaves apart a stream that ends from one that was cut off.
func fill(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

func entryFault(err error, name string) error {
	var known *fault.Error
	switch {
	case err == nil || errors.As(err, &known):
		return err
	case errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT):
		return fault.Wrap(fault.Precondition, err, "no room to unpack %s", name).WithHint("free some space there, then try again")
	case errors.Is(err, fs.ErrExist):
		return fault.New(fault.Precondition, "the archive holds %q twice", name)
	}
	return fault.Wrap(fault.Precondition, err, "cannot unpack %s", name)
}
