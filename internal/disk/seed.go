package disk

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"banger/internal/fault"
	"banger/internal/system"
)

// CreateExt4FromTar makes path a sparse file of size bytes with a writable ext4 that holds the
// directories, regular files and links of a tar stream, with their owners, modes and times,
// whoever runs it. Meant for small trees such as a home directory. What it cannot hold (devices, FIFOs, names with a
// quote or a newline, extended attributes) is left out and returned, a line each. The same stream gives the same bytes.
func CreateExt4FromTar(ctx context.Context, path string, size int64, label string, tarStream io.Reader) (skipped []string, err error) {
	dir, err := os.MkdirTemp(filepath.Dir(path), temporaryPrefix)
	if err != nil {
		return nil, spaceFault(err, path)
	}
	defer func() { _ = os.RemoveAll(dir) }()
	sum := sha256.New()
	t, err := unpackTree(tar.NewReader(io.TeeReader(&contextReader{ctx: ctx, r: tarStream}, sum)), dir)
	if err != nil {
		return nil, spaceFault(fmt.Errorf("cannot unpack a tar stream for %s: %w", filepath.Base(path), err), path)
	}
	if err := makeExt4(ctx, path, size, label, &content{dir: dir, sum: sum.Sum(nil)}); err != nil {
		return nil, err
	}
	if err := setOwners(ctx, path, t.commands.String()); err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return t.skipped, nil
}

// treeUnpacker writes a tree below a directory, and the commands for debugfs that give its files
// their owners, modes and times, which the user who runs this may not be allowed to set.
type treeUnpacker struct {
	root     *os.Root
	made     map[string]bool // directories
	commands strings.Builder
	skipped  []string
}

func unpackTree(r *tar.Reader, dir string) (*treeUnpacker, error) {
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
	if strings.ContainsAny(name, "\"\n\r") {
		t.skip(name, "its name cannot be written")
		return nil
	}
	for key := range h.PAXRecords {
		if attribute, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
			t.skip(name, "its attribute "+attribute)
		}
	}
	if name != "" {
		if err := t.directory(parent(name)); err != nil {
			return err
		}
	}
	kind, err := t.unpack(name, h, r)
	if kind != 0 && err == nil {
		ext4Fields(&t.commands, name, kind, h)
	}
	return err
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

func (t *treeUnpacker) skip(name, what string) {
	t.skipped = append(t.skipped, fmt.Sprintf("%q: %s", name, what))
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
	}
	t.skip(name, "neither directory, file nor link")
	return 0, nil
}

func (t *treeUnpacker) link(name, target string) error {
	err := t.root.Link(filepath.Clean("/" + target)[1:], name)
	if errors.Is(err, fs.ErrNotExist) { // its target was left out
		t.skip(name, "a hard link to "+strconv.Quote(target))
		return nil
	}
	return err
}

// ext4Fields sets what mke2fs has from the file on the host. The "extra" fields hold nanoseconds and the higher bits of
// seconds (Documentation/filesystems/ext4/inodes.rst, "Inode Timestamps").
func ext4Fields(w *strings.Builder, name string, kind int64, h *tar.Header) {
	set := func(field, value string) { fmt.Fprintf(w, "set_inode_field \"/%s\" %s %s\n", name, field, value) }
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
		set(field, fmt.Sprintf("@%d", seconds))
		set(field+"_extra", fmt.Sprint(nanoseconds<<2|epoch))
	}
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
