package supply

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/google/renameio/v2"

	"banger/internal/archive"
	"banger/internal/bundle"
	"banger/internal/fault"
)

// PackOptions say what a bundle gets.
type PackOptions struct {
	Archive string            // the file to write
	Kernel  string            // directory of a kernel of the catalogue; "" is none
	Image   string            // the same of an image
	VMMs    map[string]string // paths of programs, by name
	Version string            // of banger
}

// Packed is a bundle that was packed.
type Packed struct {
	Archive string // absolute
	Listing string // the manifest beside it, which lists it
	SHA256  string
	Bytes   int64
	Files   int
}

// Pack writes a bundle and lists it in the manifest beside it, so that the two can be put anywhere together.
func (s *Store) Pack(ctx context.Context, o PackOptions) (p Packed, err error) {
	path, err := filepath.Abs(o.Archive)
	if err != nil {
		return p, fault.Wrap(fault.Precondition, err, "cannot write %s", o.Archive)
	}
	err = s.Sink.Run(stagePack, func() error {
		entries, err := o.entries(ctx)
		if err != nil {
			return err
		}
		p = Packed{Archive: path, Listing: filepath.Join(filepath.Dir(path), bundle.SourceFile), Files: len(entries)}
		return p.write(ctx, entries)
	})
	if err != nil {
		return Packed{}, err
	}
	return p, list(p.Listing, Listed{Architecture: runtime.GOARCH, Version: o.Version, URL: filepath.Base(path), SHA256: p.SHA256})
}

func (p *Packed) write(ctx context.Context, entries []archive.Entry) (err error) {
	if err := os.MkdirAll(filepath.Dir(p.Archive), 0o755); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write %s", p.Archive)
	}
	f, err := renameio.NewPendingFile(p.Archive, renameio.WithPermissions(0o644))
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write %s", p.Archive)
	}
	defer func() { err = errors.Join(err, f.Cleanup()) }()
	sum := sha256.New()
	err = archive.Pack(ctx, io.MultiWriter(f, sum), entries)
	if err == nil {
		p.Bytes, err = f.Seek(0, io.SeekCurrent)
	}
	if err == nil {
		err = f.CloseAtomicallyReplace()
	}
	if err != nil {
		kind := fault.KindOf(err)
		if kind == fault.Unexpected {
			kind = fault.Precondition
		}
		return fault.Wrap(kind, err, "cannot write %s", p.Archive)
	}
	p.SHA256 = hex.EncodeToString(sum.Sum(nil))
	return nil
}

// roles tells which file of a kernel's or image's directory is what; the first that is there counts.
var roles = struct{ kernel, initramfs, modules, image []string }{
	kernel: []string{"vmlinuz", "vmlinux"}, initramfs: []string{"boot-modules.cpio"},
	modules: []string{"modules.ext4"}, image: []string{"root.ext4"},
}

func (o PackOptions) entries(ctx context.Context) ([]archive.Entry, error) {
	m := bundle.Manifest{Schema: bundle.Schema, Version: o.Version, Architecture: runtime.GOARCH, VMMs: map[string]string{}, Helpers: map[string]string{}}
	var entries []archive.Entry
	add := func(name, path string) { entries = append(entries, archive.Entry{Name: name, Path: path}) }
	for _, part := range []struct{ name, dir string }{{"kernel", o.Kernel}, {"image", o.Image}} {
		if part.dir == "" {
			continue
		}
		names, err := filesOf(part.dir)
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			add(part.name+"/"+name, filepath.Join(part.dir, name))
		}
	}
	for _, name := range slices.Sorted(maps.Keys(o.VMMs)) {
		add("vmm/"+name, o.VMMs[name])
		m.VMMs[name] = "vmm/" + name
	}
	if len(entries) == 0 {
		return nil, fault.New(fault.Precondition, "there is nothing to pack: no kernel, no image, no VMM").
			WithHint("make kernel and image with: banger setup")
	}
	pick := func(dir string, names []string) string {
		for _, name := range names {
			if slices.ContainsFunc(entries, func(e archive.Entry) bool { return e.Name == dir+"/"+name }) {
				return dir + "/" + name
			}
		}
		return ""
	}
	m.Kernel, m.Initramfs = pick("kernel", roles.kernel), pick("kernel", roles.initramfs)
	m.Modules, m.Image = pick("kernel", roles.modules), pick("image", roles.image)
	var err error
	if m.Files, err = summedAll(ctx, entries); err != nil {
		return nil, err
	}
	text, err := json.MarshalIndent(m, "", "  ")
	return slices.Insert(entries, 0, archive.Entry{Name: bundle.ManifestName, Data: append(text, '\n')}), err
}

func filesOf(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot pack %s", dir)
	}
	var names []string
	for _, e := range entries {
		if e.Type() == fs.FileMode(0) {
			names = append(names, e.Name())
		}
	}
	return names, nil
}

func summedAll(ctx context.Context, entries []archive.Entry) ([]bundle.File, error) {
	files := make([]bundle.File, len(entries))
	for i, e := range entries {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		f, err := summed(e.Path, e.Name)
		if err != nil {
			return nil, fault.Wrap(fault.Precondition, err, "cannot pack %s", e.Name)
		}
		files[i] = f
	}
	return files, nil
}

// ArchiveName is what a bundle of this machine is called unless said otherwise.
func ArchiveName(version string) string {
	return fmt.Sprintf("dist/banger-runtime-%s-%s.tar.zst", version, runtime.GOARCH)
}
