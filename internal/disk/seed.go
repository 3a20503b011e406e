package disk

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"banger/internal/fault"
	"banger/internal/fileio"
	"banger/internal/system"
)

// CreateExt4FromTar makes path a sparse file of size bytes with a writable ext4 that holds the
// files of a tar stream, with their owners, modes, times and extended attributes (in the form in which ext4 stores them),
// whoever runs it. Meant for small trees such as a home directory. What it cannot hold (names with a newline, attributes without
// room) is left out and returned, a line each. The same stream gives the same bytes.
func CreateExt4FromTar(ctx context.Context, path string, size int64, label string, tarStream io.Reader) (skipped []string, err error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), temporaryPrefix)
	if err != nil {
		return nil, spaceFault(err, path)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	sum := sha256.New()
	tree := filepath.Join(dir, "tree")
	t, err := unpackTree(tar.NewReader(io.TeeReader(fileio.Until(ctx, tarStream), sum)), tree)
	if err != nil {
		return nil, spaceFault(fmt.Errorf("cannot unpack a tar stream for %s: %w", filepath.Base(path), err), path)
	}
	if err := makeExt4(ctx, path, size, label, &content{dir: tree, sum: sum.Sum(nil)}); err != nil {
		return nil, err
	}
	err = t.setAttributes(path, filepath.Join(dir, "values"))
	if err == nil {
		err = setOwners(ctx, path, t.commands.String())
	}
	if err != nil {
		return nil, errors.Join(spaceFault(err, path), os.Remove(path))
	}
	return t.skipped.Lines(), nil
}

// treeUnpacker writes a tree below a directory, and the commands for debugfs that give its files what the user who runs
// this may not be allowed to: owners, modes, times and attributes; and that make devices and FIFOs.
type treeUnpacker struct {
	root       *os.Root
	made       map[string]bool // directories
	attributes []attributed
	commands   strings.Builder
	skipped    LeftOut
}

// attributed is a file with extended attributes.
type attributed struct {
	file   string
	values map[string]string // by name
}

func unpackTree(r *tar.Reader, dir string) (*treeUnpacker, error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, err
	}
	defer func() { _ = root.Close() }()
	t := &treeUnpacker{root: root, made: map[string]bool{}}
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return t, t.directory("")
		}
		if err != nil {
			return nil, err
		}
		if err := t.take(h, r); err != nil {
			return nil, err
		}
	}
}

// take writes an entry, or notes that it is left out.
func (t *treeUnpacker) take(h *tar.Header, r io.Reader) error {
	name := filepath.Clean("/" + h.Name)[1:]
	if !quotable(name) {
		t.skipped.Add(name, "its name cannot be written")
		return nil
	}
	if name != "" {
		if err := t.directory(parent(name)); err != nil {
			return err
		}
	}
	kind, err := t.unpack(name, h, r)
	if kind == 0 || err != nil {
		return err
	}
	ext4Fields(&t.commands, name, kind, h)
	values := map[string]string{}
	for key, value := range h.PAXRecords {
		if attribute, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			values[attribute] = value
		}
	}
	if len(values) > 0 {
		t.attributes = append(t.attributes, attributed{name, values})
	}
	return nil
}

// parent is the directory that a file is in; "" is the root.
func parent(name string) string { return filepath.Dir("/" + name)[1:] }

// directory makes a directory that no entry has told of so far, as mke2fs makes its root.
func (t *treeUnpacker) directory(name string) error {
	if t.made[name] {
		return nil
	}
	if name != "" {
		if err := t.directory(parent(name)); err != nil {
			return err
		}
	}
	h := &tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}
	kind, err := t.unpack(name, h, nil)
	ext4Fields(&t.commands, name, kind, h)
	return err
}

// unpack returns the file type bits of the entry's mode; 0: it has none of its own.
func (t *treeUnpacker) unpack(name string, h *tar.Header, r io.Reader) (kind int64, err error) {
	switch h.Typeflag {
	case tar.TypeDir:
		t.made[name] = true
		if name == "" {
			return 0o040000, nil
		}
		return 0o040000, t.root.MkdirAll(name, 0o700)
	case tar.TypeSymlink:
		return 0o120000, t.root.Symlink(h.Linkname, name)
	case tar.TypeLink:
		return 0, t.link(name, h.Linkname)
	case tar.TypeReg:
		f, err := t.root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return 0, err
		}
		_, err = io.Copy(f, r)
		return 0o100000, errors.Join(err, f.Close())
	case tar.TypeFifo:
		return 0o010000, t.special(name, "p")
	case tar.TypeChar:
		return 0o020000, t.device(name, 'c', h)
	case tar.TypeBlock:
		return 0o060000, t.device(name, 'b', h)
	}
	t.skipped.Add(name, "its type is unknown")
	return 0, nil
}

// special makes a file that only root may make; debugfs does so in its own working directory alone.
func (t *treeUnpacker) special(name, what string) error {
	fmt.Fprintf(&t.commands, "cd %s\nmknod %s %s\ncd /\n", quote("/"+parent(name)), quote(filepath.Base(name)), what)
	return nil
}

// device makes a device. debugfs takes no minor number of more than 16 bits, and knows the field that holds 20
// (linux/kdev_t.h, new_encode_dev).
func (t *treeUnpacker) device(name string, kind byte, h *tar.Header) error {
	if h.Devminor <= math.MaxUint16 {
		return t.special(name, fmt.Sprintf("%c %d %d", kind, h.Devmajor, h.Devminor))
	}
	err := t.special(name, fmt.Sprintf("%c 0 0", kind))
	number := h.Devminor&0xff | h.Devmajor<<8 | h.Devminor&^0xff<<12
	fmt.Fprintf(&t.commands, "set_inode_field %s block[1] %d\n", quote("/"+name), number)
	return err
}

func (t *treeUnpacker) link(name, target string) error {
	err := t.root.Link(filepath.Clean("/" + target)[1:], name)
	if errors.Is(err, fs.ErrNotExist) { // its target was left out, or only debugfs makes it
		t.skipped.Add(name, "a hard link to "+strconv.Quote(target))
		return nil
	}
	return err
}

// ext4Fields sets what mke2fs has from the file on the host. The "extra" fields hold nanoseconds and the higher bits of
// seconds (Documentation/filesystems/ext4/inodes.rst, "Inode Timestamps").
func ext4Fields(w *strings.Builder, name string, kind int64, h *tar.Header) {
	set := func(field, value string) {
		fmt.Fprintf(w, "set_inode_field %s %s %s\n", quote("/"+name), field, value)
	}
	set("mode", fmt.Sprintf("0%o", kind|h.Mode&0o7777))
	set("uid", fmt.Sprint(h.Uid))
	set("gid", fmt.Sprint(h.Gid))
	var at time.Time
	if at = h.ModTime; at.IsZero() {
		at = time.Unix(0, 0)
	}
	seconds, nanoseconds := at.Unix(), uint32(at.Nanosecond())
	epoch := uint32((seconds-int64(int32(seconds)))>>32) & 3
	for _, field := range []string{"atime", "ctime", "mtime", "crtime"} {
		set(field, fmt.Sprintf("@%d", uint32(seconds))) // it has no place for -1
		set(field+"_extra", fmt.Sprint(nanoseconds<<2|epoch))
	}
}

// maxQuoted is how long a name in a command may be: debugfs reads lines of 8 KiB, and takes the rest of a longer one for another.
const maxQuoted = 6 << 10

func quotable(name string) bool {
	return !strings.ContainsAny(name, "\n\r\x00") && len(quote(name)) <= maxQuoted
}

// quote writes an argument as libss reads it, which debugfs is made of: a quote within is doubled.
func quote(s string) string { return `"` + strings.ReplaceAll(s, `"`, `""`) + `"` }

// setAttributes adds the commands that set the extended attributes in the ext4 at path. Their values lie in files of a new directory,
// in that of the ext4.
func (t *treeUnpacker) setAttributes(path, values string) error {
	if len(t.attributes) == 0 {
		return nil
	}
	room, err := roomOf(path)
	if err != nil {
		return err
	}
	if err := os.Mkdir(values, 0o700); err != nil {
		return err
	}
	below, err := filepath.Rel(filepath.Dir(path), values)
	if err != nil {
		return err
	}
	written := map[string]string{} // by value: labels are the same on many files
	for _, a := range t.attributes {
		kept, left := room.Fit(a.values)
		for _, name := range left {
			t.skipped.Add(a.file, "its attribute "+name+" has no room beside the others")
		}
		for _, name := range kept {
			if !quotable(name) {
				t.skipped.Add(a.file, "its attribute "+strconv.Quote(name)+": its name cannot be written")
				continue
			}
			value := a.values[name]
			file := written[value]
			if file == "" {
				file = strconv.Itoa(len(written))
				written[value] = file
				if err := os.WriteFile(filepath.Join(values, file), []byte(value), 0o600); err != nil {
					return err
				}
			}
			fmt.Fprintf(&t.commands, "ea_set -r -f %s %s %s\n", quote(filepath.Join(below, file)), quote("/"+a.file), quote(name))
		}
	}
	return nil
}

func setOwners(ctx context.Context, path, script string) error {
	debugfs, err := system.Find("debugfs", e2fsprogs)
	if err != nil {
		return err
	}
	var complaint string
	_, err = runOn(ctx, path, system.Command{
		Path: debugfs, Args: []string{"-w", "-f", "-"}, Stdin: strings.NewReader(script), Timeout: toolTimeout, Env: timeStandsStill(makingTime),
		OnStderrLine: func(line string) {
			if complaint == "" && !strings.HasPrefix(line, "debugfs ") { // it greets there
				complaint = line
			}
		},
	})
	if err == nil && complaint != "" { // it exits with 0 all the same
		err = fault.New(fault.Unexpected, "debugfs on %s: %s", filepath.Base(path), complaint)
	}
	return err
}
