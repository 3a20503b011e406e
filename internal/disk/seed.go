package disk

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"banger/internal/fault"
	"banger/internal/system"
)

// CreateExt4FromTar makes path a sparse file of size bytes with a writable ext4 that holds the
// directories, regular files and symbolic links of a tar stream, with their owners and modes,
// whoever runs it. Meant for small trees such as a home directory; other kinds of entry are a Usage fault.
func CreateExt4FromTar(ctx context.Context, path string, size int64, label string, tarStream io.Reader) error {
	tree, err := os.MkdirTemp(filepath.Dir(path), temporaryPrefix)
	if err != nil {
		return spaceFault(err, path)
	}
	defer func() { _ = os.RemoveAll(tree) }()
	script, err := unpackTree(tar.NewReader(&contextReader{ctx: ctx, r: tarStream}), tree)
	if err != nil {
		return spaceFault(fmt.Errorf("cannot unpack a tar stream for %s: %w", filepath.Base(path), err), path)
	}
	if err := makeExt4(ctx, path, size, label, tree); err != nil {
		return err
	}
	if err := setOwners(ctx, path, script); err != nil {
		return errors.Join(err, os.Remove(path))
	}
	return nil
}

// unpackTree writes the entries below dir and returns the commands for debugfs that give them
// their owners, modes and times, which the user who runs this may not be allowed to set.
func unpackTree(r *tar.Reader, dir string) (script string, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return "", err
	}
	defer func() { _ = root.Close() }()
	var commands strings.Builder
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return commands.String(), nil
		}
		if err != nil {
			return "", err
		}
		name := filepath.Clean("/" + h.Name)[1:]
		if strings.ContainsAny(name, "\"\n") {
			return "", fault.New(fault.Usage, "file name %q cannot be written", name)
		}
		kind, err := unpackEntry(root, name, h, r)
		if err != nil {
			return "", err
		}
		ext4Fields(&commands, name, kind, h)
	}
}

// unpackEntry returns the file type bits of the entry's mode.
func unpackEntry(root *os.Root, name string, h *tar.Header, r io.Reader) (kind int64, err error) {
	switch h.Typeflag {
	case tar.TypeDir:
		if name == "" {
			return 0o040000, nil
		}
		return 0o040000, root.MkdirAll(name, 0o700)
	case tar.TypeSymlink:
		return 0o120000, root.Symlink(h.Linkname, name)
	case tar.TypeReg:
		f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
		if err != nil {
			return 0, err
		}
		_, err = io.Copy(f, r)
		return 0o100000, errors.Join(err, f.Close())
	}
	return 0, fault.New(fault.Usage, "%s is neither directory, file nor symbolic link", h.Name)
}

func ext4Fields(w *strings.Builder, name string, kind int64, h *tar.Header) {
	set := func(field, value string) { fmt.Fprintf(w, "set_inode_field \"/%s\" %s %s\n", name, field, value) }
	set("mode", fmt.Sprintf("0%o", kind|h.Mode&0o7777))
	set("uid", fmt.Sprint(h.Uid))
	set("gid", fmt.Sprint(h.Gid))
	set("mtime", h.ModTime.UTC().Format("20060102150405"))
}

func setOwners(ctx context.Context, path, script string) error {
	debugfs, err := system.Find("debugfs", e2fsprogs)
	if err != nil {
		return err
	}
	var complaint string
	_, err = runOn(ctx, path, system.Command{
		Path: debugfs, Args: []string{"-w", "-f", "-"}, Stdin: strings.NewReader(script), Timeout: time.Minute,
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
