package image

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"al.essio.dev/pkg/shellescape"

	"banger/internal/artifact"
	"banger/internal/debian"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/image/layer"
	"banger/internal/image/oci"
	"banger/internal/progress"
)

// StageImport is the name of the stage that Import reports.
const StageImport = "import"

// importSpace is what must be free beside the content: the work seed's metadata, and some to spare.
const importSpace = 200 << 20

// maxImportedHome bounds the files in /root of an imported image; the work seed grows with them.
const maxImportedHome = 32 << 30

// ImportOptions say what to import.
type ImportOptions struct {
	// Source is the absolute path of a file or directory, or a reference to an image in a registry.
	Source string
	Name   string // of the new image; empty: one is made of the source and the content
	Select string // of several images in one file, the one with this name
	// Present returns the newest image that was imported from the same reference, when there is one, and asks
	// no registry.
	Present bool
}

// Import makes an image of a tar archive of a root file system (also packed), of a container image (a reference to
// a registry, an OCI layout, an archive of "docker save"), or of a file with an ext4. Without root rights, and
// without loop devices.
func (s *Store) Import(ctx context.Context, o ImportOptions, sink progress.Sink) (i Image, err error) {
	if err := s.Free(o.Name); err != nil {
		return i, err
	}
	what, err := s.recognize(ctx, o)
	if err != nil {
		return i, err
	}
	if o.Present && what.reference != "" {
		if i, err := s.Get(ctx, what.reference); err == nil {
			return i, nil
		}
	}
	err = sink.Run(StageImport, func() error {
		i, err = s.importAs(ctx, o, what, sink)
		return err
	})
	return i, err
}

func (s *Store) importAs(ctx context.Context, o ImportOptions, what source, sink progress.Sink) (Image, error) {
	defer elbowRoom()()
	name, err := s.shelf.Build(func(dir string) (string, any, error) {
		b := &importing{options: o, source: what, dir: dir, work: filepath.Join(dir, "work"), sink: sink}
		m, err := b.run(ctx)
		if err != nil {
			return "", nil, err
		}
		if err := os.RemoveAll(b.work); err != nil {
			return "", nil, err
		}
		return m.Name, m, s.Free(o.Name) // somebody may have taken it since we looked
	})
	if err != nil {
		return Image{}, noRoom(err, s.shelf.Dir(""))
	}
	return s.Get(ctx, name)
}

// importing is one import at work.
type importing struct {
	options ImportOptions
	source  source
	dir     string // of the new image
	work    string // for temporary files
	sink    progress.Sink
}

func (b *importing) run(ctx context.Context) (Manifest, error) {
	m := Manifest{Architecture: runtime.GOARCH, Source: b.source.title(), CreatedAt: time.Now().UTC()}
	if err := os.MkdirAll(b.work, 0o700); err != nil {
		return m, err
	}
	var err error
	if b.source.kind == kindExt4 {
		err = b.importExt4(ctx, &m)
	} else {
		err = b.importLayers(ctx, &m)
	}
	if err != nil {
		return m, err
	}
	b.sink.Update(StageImport, "summing up", 0.97)
	files := []string{rootName}
	if _, err := os.Stat(filepath.Join(b.dir, seedName)); err == nil {
		files = append(files, seedName)
	}
	if m.Files, err = artifact.Describe(b.dir, files...); err != nil {
		return m, err
	}
	m.Digest = artifact.Digest(m.Files)
	b.name(&m)
	return m, nil
}

// importLayers goes the way of all that comes as tar streams.
func (b *importing) importLayers(ctx context.Context, m *Manifest) error {
	found, err := b.open(ctx)
	if err != nil && b.source.kind == kindReference { // which is in what its registry says
		return err
	}
	if err != nil {
		return b.of(err)
	}
	m.SourceDigest = found.Digest
	if found.Reference != "" {
		m.Source = found.Reference
	}
	b.sink.Update(StageImport, "looking through the archive", 0.4)
	merged, err := layer.Merge(ctx, layer.Options{Whiteouts: b.source.kind != kindTar, Apart: "root/", Directories: mountPoints, Dir: b.work}, found.Layers...)
	if err != nil {
		return b.of(err)
	}
	if merged.Files == 0 {
		return fault.New(fault.Precondition, "there are no files in %s", b.source.title())
	}
	if err := disk.RequireFree(filepath.Dir(b.dir), merged.Bytes+importSpace, "the image"); err != nil {
		return err
	}
	result, err := b.writeRoot(ctx, merged, importRules(merged, found.Env))
	if err != nil {
		return err
	}
	m.Packages, m.PackagesHash = result.packages, hash(strings.Join(result.packages, "\n"))
	b.sink.Update(StageImport, "making the work seed", 0.9)
	skipped, err := writeSeedFrom(ctx, filepath.Join(b.work, homeName), filepath.Join(b.dir, seedName))
	m.Skipped = append(merged.Skipped(), skipped...)
	return err
}

// of says of which source an error is.
func (b *importing) of(err error) error {
	return fault.Wrap(fault.KindOf(err), err, "%s", b.source.title())
}

// mountPoints are the directories that file systems are mounted on before the image's own programs run, and the one that a
// file system brings.
var mountPoints = []string{"dev", "lost+found", "proc", "root", "run", "sys"}

// open finds the layers.
func (b *importing) open(ctx context.Context) (*oci.Image, error) {
	free, err := disk.FreeBytes(b.work)
	if err != nil {
		return nil, err
	}
	o := oci.Options{
		Dir: b.work, Architecture: runtime.GOARCH, Select: b.options.Select, Room: max(1, free-importSpace), Progress: b.fetched,
	}
	path := b.source.path
	if b.source.packed && b.source.kind != kindTar { // it is read here and there: that needs a plain one
		b.sink.Update(StageImport, "unpacking the archive", 0.05)
		if path, err = oci.Unpack(ctx, path, o); err != nil {
			return nil, err
		}
	}
	switch b.source.kind {
	case kindReference:
		b.sink.Update(StageImport, "asking the registry", 0)
		return oci.Fetch(ctx, b.source.reference, o)
	case kindLayout:
		return oci.OpenLayout(path, o)
	case kindDockerArchive:
		return oci.OpenDockerArchive(path, o)
	case kindLayoutArchive:
		return oci.OpenLayoutArchive(ctx, path, o)
	}
	return &oci.Image{Layers: []layer.Layer{tarLayer(path, b.source.packed)}}, nil
}

func (b *importing) fetched(done, all int64) {
	b.sink.Update(StageImport, fmt.Sprintf("fetching layers (%d of %d MB)", done/1_000_000, all/1_000_000), 0.4*float64(done)/float64(max(all, 1)))
}

// tarLayer opens a tar file. One that is not packed can be skimmed: the reader seeks over what it does not read.
func tarLayer(path string, packed bool) layer.Layer {
	return func() (io.ReadCloser, error) {
		f, err := os.Open(path)
		if err != nil || !packed {
			return f, err
		}
		r, err := debian.Decompress(f)
		if err != nil {
			return nil, errors.Join(err, f.Close())
		}
		return both{r, f}, nil
	}
}

// both is an unpacked stream with the file beneath it.
type both struct {
	io.ReadCloser
	file *os.File
}

func (b both) Close() error { return errors.Join(b.ReadCloser.Close(), b.file.Close()) }

// homeName is where the content of /root waits for the work seed to be made.
const homeName = "home.tar"

// writeRoot lets the merged layers flow through the filter into an ext4, with no copy in between.
func (b *importing) writeRoot(ctx context.Context, merged *layer.Merged, r rules) (result *filtered, err error) {
	out, err := os.OpenFile(filepath.Join(b.dir, rootName), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, out.Close()) }()
	home, err := os.OpenFile(filepath.Join(b.work, homeName), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, home.Close()) }()

	result = &filtered{}
	return result, pipeline(ctx,
		func(w io.Writer) error {
			return merged.Write(ctx, w, func(done, all int64) {
				b.sink.Update(StageImport, "writing the file system", 0.5+0.4*float64(done)/float64(max(all, 1)))
			})
		},
		func(w io.Writer, in io.Reader) error {
			f := newFilter(r, w, home, result)
			if err := f.run(ctx, in); err != nil {
				return err
			}
			return f.finish()
		},
		func(in io.Reader) error { return disk.WriteExt4(ctx, in, out) },
	)
}

// pipeline joins three parts by pipes and returns the error that the others follow from.
func pipeline(ctx context.Context, first func(io.Writer) error, second func(io.Writer, io.Reader) error, third func(io.Reader) error) error {
	raw, rawIn := io.Pipe()
	kept, keptIn := io.Pipe()
	filterDone, writeDone := make(chan error, 1), make(chan error, 1)
	go func() {
		err := second(keptIn, raw)
		_ = keptIn.CloseWithError(err) // nil is end of file; these closes never fail
		_ = raw.CloseWithError(err)
		filterDone <- err
	}()
	go func() {
		err := third(kept)
		_ = kept.CloseWithError(err)
		writeDone <- err
	}()
	firstErr := first(rawIn)
	_ = rawIn.CloseWithError(firstErr)
	filterErr, writeErr := <-filterDone, <-writeDone
	return firstCause(ctx, writeErr, filterErr, firstErr)
}

// importRules keep all of an imported image. Its environment goes where logins look for it.
func importRules(merged *layer.Merged, env []string) rules {
	r := rules{
		dropped: func(string, bool) bool { return false }, added: map[string]string{}, maxHome: maxImportedHome,
		needed: map[string]int64{"dev": 0o755, "proc": 0o555, "sys": 0o555, "run": 0o755, "tmp": 0o1777, "root": 0o700},
	}
	var lines, exports strings.Builder
	for _, e := range env {
		name, value, ok := strings.Cut(e, "=")
		if !ok || !environmentName.MatchString(name) || strings.ContainsAny(value, "\n\r\x00") || slices.Contains(notKept, name) {
			continue
		}
		fmt.Fprintf(&lines, "%s=%s\n", name, value)
		fmt.Fprintf(&exports, "export %s=%s\n", name, shellescape.Quote(value))
	}
	if lines.Len() == 0 {
		return r
	}
	const head = "# The environment that the image was made with.\n"
	for name, text := range map[string]string{"etc/environment": head + lines.String(), "etc/profile.d/00-image.sh": head + exports.String()} {
		if !merged.Append(name, text) {
			r.added[name] = text
		}
	}
	r.dropped = func(name string, dir bool) bool { return r.added[name] != "" && !dir } // something odd of that name
	return r
}

// notKept are variables that each login and each terminal has of its own.
var notKept = []string{"HOME", "TERM", "HOSTNAME", "USER", "PWD", "SHLVL"}

var environmentName = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// noRoom tells a full disk from other failures.
func noRoom(err error, dir string) error {
	if !errors.Is(err, errNoSpace) || fault.KindOf(err) != fault.Unexpected {
		return err
	}
	return fault.Wrap(fault.Precondition, err, "no room for the image").WithHint("free some space in %s", dir)
}
