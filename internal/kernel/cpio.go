package kernel

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path"
)

// File types in a cpio mode, as in stat(2).
const (
	typeDir  = 0o040000
	typeFile = 0o100000
	typeChar = 0o020000
)

// trailer is the name of the last entry of an archive.
const trailer = "TRAILER!!!"

// entry is one entry of a cpio archive.
type entry struct {
	name         string
	mode         int64 // type and permissions
	major, minor int64 // of a device
	size         int64
	content      io.Reader // exactly size bytes; may be nil
}

// archiveWriter writes a cpio archive in the newc format of the kernel's
// Documentation/driver-api/early-userspace/buffer-format.rst, everything owned by root and without
// times, and remembers the first error. (The cpio library writes no device numbers.)
type archiveWriter struct {
	w     io.Writer
	made  map[string]bool
	inode int64
	err   error
}

func newArchive(w io.Writer) *archiveWriter {
	return &archiveWriter{w: w, made: map[string]bool{".": true}}
}

func (a *archiveWriter) put(e entry) {
	if a.err != nil {
		return
	}
	a.inode++
	header := "070701"
	for _, field := range []int64{a.inode, e.mode, 0, 0, 1, 0, e.size, 0, 0, e.major, e.minor, int64(len(e.name) + 1), 0} {
		header += fmt.Sprintf("%08X", field)
	}
	header += e.name + "\x00"
	if _, a.err = io.WriteString(a.w, header+padding(int64(len(header)))); a.err != nil || e.content == nil {
		return
	}
	if _, a.err = io.CopyN(a.w, e.content, e.size); a.err != nil {
		return
	}
	_, a.err = io.WriteString(a.w, padding(e.size))
}

// padding returns what is missing to a multiple of four.
func padding(n int64) string { return "\x00\x00\x00"[:(4-n%4)%4] }

func (a *archiveWriter) mkdirAll(dir string) {
	if a.made[dir] {
		return
	}
	a.made[dir] = true
	a.mkdirAll(path.Dir(dir))
	a.put(entry{name: dir, mode: typeDir | 0o755})
}

func (a *archiveWriter) putFile(name string, mode, size int64, content io.Reader) {
	a.mkdirAll(path.Dir(name))
	a.put(entry{name: name, mode: typeFile | mode, size: size, content: content})
}

func (a *archiveWriter) copyFile(name, source string, mode int64) {
	f, err := os.Open(source)
	if err != nil {
		a.err = errors.Join(a.err, err)
		return
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		a.err = errors.Join(a.err, err)
		return
	}
	a.putFile(name, mode, info.Size(), f)
}

// close ends the archive, its length a multiple of four.
func (a *archiveWriter) close() error {
	a.inode = -1 // the last entry has inode 0
	a.put(entry{name: trailer})
	return a.err
}
