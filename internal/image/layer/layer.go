// Package layer makes one root file system of the layers of a container image, or of a single tar archive. It
// reads the archives twice: first the headers, to know what is there in the end, then the content, which flows on as
// one tar stream. No file of the archives is ever written to the host, so that no name in them can mean one.
package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path"
	"slices"
	"strings"

	"banger/internal/disk"
	"banger/internal/fault"
)

// Layer opens a layer as a plain tar stream, from its beginning. It is called twice.
type Layer func() (io.ReadCloser, error)

// Options say how archives are read. The limits are zero for ones far above what images have.
type Options struct {
	Whiteouts bool // names that begin with ".wh." take away what lower layers have
	// Apart begins the names of files that share no hard links with others, "root/": a file with names on both sides
	// is written twice. Empty: there are no such sides.
	Apart string
	// Directories are names below the root that are directories in the end: what else layers have there is left out.
	Directories []string
	Dir         string // for temporary files
	MaxBytes    int64  // of content, with what later layers replace
	MaxEntries  int    // headers of all layers
}

const (
	defaultBytes   = 60 << 30
	defaultEntries = 2_000_000 // at up to some 500 bytes of memory each
	maxTrailer     = 64 << 20  // bytes behind an archive's end: tar pads, but not without end
)

const (
	maxName  = 255  // bytes of one component, as ext4 has it
	maxPath  = 4096 // bytes, as Linux has it
	maxHops  = 40   // symbolic links on the way to a file, as Linux has it
	maxLinks = 65000
)

// kind is what a file is, as far as the merging of layers cares.
type kind uint8

const (
	other kind = iota
	directory
	symlink
)

// node is a file; several names may lead to one that is no directory.
type node struct {
	kind     kind
	layer    int              // the last layer that told of it
	target   string           // of a symlink
	children map[string]*node // of a directory
	header   *tar.Header      // of a directory; nil: it was only implied by what is in it
	names    []string         // all paths that lead to it in the end
}

func newDirectory(layer int) *node {
	return &node{kind: directory, layer: layer, children: map[string]*node{}}
}

// Merged is what layers add up to.
type Merged struct {
	layers []Layer
	root   *node
	// entries holds, for each layer and each header in it, the file that has its content from there.
	entries [][]*node
	options Options
	count   int
	// appended is text for the ends of files.
	appended map[*node]string
	skipped  disk.LeftOut

	Files int   // in the end, directories too
	Bytes int64 // of content, with what later layers replace
}

// Merge reads the headers of the layers, the lowest first. Whiteouts (OCI image specification, layer.md) take
// away what lower layers have. A damaged archive, or one that asks for what cannot be, is a Precondition fault.
func Merge(ctx context.Context, o Options, layers ...Layer) (*Merged, error) {
	if o.MaxBytes == 0 {
		o.MaxBytes = defaultBytes
	}
	if o.MaxEntries == 0 {
		o.MaxEntries = defaultEntries
	}
	m := &Merged{layers: layers, root: newDirectory(0), options: o}
	for i := range layers {
		entries, err := m.readLayer(ctx, i)
		if err != nil {
			return nil, err
		}
		m.entries = append(m.entries, entries)
	}
	for _, name := range o.Directories {
		if n := m.root.children[name]; n != nil && n.kind != directory {
			m.root.children[name] = newDirectory(0)
			m.skip(name, n.whatElse())
		}
	}
	m.nameAll(m.root, "")
	return m, nil
}

// whatElse says why a file that is no directory had to go.
func (n *node) whatElse() string {
	if n.kind == symlink {
		return fmt.Sprintf("it is a symbolic link to %q and has to be a directory", n.target)
	}
	return "it has to be a directory"
}

func (m *Merged) skip(name, why string) { m.skipped.Add("/"+name, why) }

// Skipped tells what was left out, a line each. All of it is known when Write is done.
func (m *Merged) Skipped() []string { return m.skipped.Lines() }

// closeAfter closes what was read. Where the reading failed already, it would only say so again.
func closeAfter(r io.Closer, err *error) {
	if closed := r.Close(); *err == nil {
		*err = closed
	}
}

func (m *Merged) readLayer(ctx context.Context, i int) (entries []*node, err error) {
	r, err := m.layers[i]()
	if err != nil {
		return nil, err
	}
	defer closeAfter(r, &err)
	err = walk(ctx, r, func(_ int, h *tar.Header, _ io.Reader) error {
		if err := m.another(); err != nil {
			return err
		}
		if h.Size < 0 || h.Size > m.options.MaxBytes-m.Bytes {
			return fault.New(fault.Precondition, "the archive holds more than %d bytes", m.options.MaxBytes)
		}
		m.Bytes += h.Size
		n, err := m.take(i, h)
		if err != nil {
			return fault.Wrap(fault.Precondition, err, "entry %q of the archive", shorten(h.Name))
		}
		entries = append(entries, n)
		return nil
	})
	return entries, err
}

// shorten makes a name one that can be read in an error.
func shorten(name string) string {
	const most = 200
	if len(name) <= most {
		return name
	}
	return name[:most] + "..."
}

// another counts an entry, or a directory that only a name implies: a name of 4096 bytes implies 2047 of them.
func (m *Merged) another() error {
	if m.count++; m.count > m.options.MaxEntries {
		return fault.New(fault.Precondition, "the archive has more than %d entries", m.options.MaxEntries)
	}
	return nil
}

// walk calls f with each entry of an archive and reads to the end of the stream.
func walk(ctx context.Context, r io.Reader, f func(index int, h *tar.Header, content io.Reader) error) error {
	t := tar.NewReader(r)
	for index := 0; ; index++ {
		if err := ctx.Err(); err != nil {
			return err
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil {
			err = f(index, h, t)
		} else {
			err = damaged(err)
		}
		if err != nil {
			return err
		}
	}
	n, err := io.Copy(io.Discard, io.LimitReader(r, maxTrailer)) // a checksum may be waiting there
	if err != nil {
		return damaged(err)
	}
	if n == maxTrailer {
		return fault.New(fault.Precondition, "the archive goes on for more than %d bytes behind its end", maxTrailer)
	}
	return nil
}

func damaged(err error) error {
	if fault.KindOf(err) != fault.Unexpected { // a checksum's, or the caller's giving up
		return err
	}
	return fault.Wrap(fault.Precondition, err, "the archive is damaged")
}

// cleanName returns a name's components joined, relative to the root: "etc/passwd". The root itself is "".
func cleanName(name string) (string, error) {
	if len(name) > maxPath {
		return "", fmt.Errorf("its name has more than %d bytes", maxPath)
	}
	if strings.Contains(name, "\x00") {
		return "", errors.New("its name has a zero byte in it")
	}
	for part := range strings.SplitSeq(name, "/") {
		if part == ".." {
			return "", errors.New("its name leads out of the archive")
		}
		if len(part) > maxName {
			return "", fmt.Errorf("a part of its name has more than %d bytes", maxName)
		}
	}
	return strings.TrimPrefix(path.Clean("/"+name), "/"), nil
}

const (
	whiteout = ".wh."
	opaque   = ".wh..wh..opq"
)

// Types of entries that GNU tar writes beside the usual ones (its manual, "Basic Tar Format").
const (
	volumeLabel = 'V' // tar --label
	dumpedDir   = 'D' // a directory, tar --listed-incremental; the names in it are its content
	restOfFile  = 'M' // of one that begins on another volume
)

// take adds what a header tells of. It returns the file whose content follows, or nil.
func (m *Merged) take(layer int, h *tar.Header) (*node, error) {
	switch h.Typeflag {
	case tar.TypeXGlobalHeader, volumeLabel:
		return nil, nil
	case dumpedDir:
		h.Typeflag = tar.TypeDir
	case restOfFile:
		return nil, errors.New("it is the rest of a file that begins on another volume")
	}
	name, err := cleanName(h.Name)
	if err != nil {
		return nil, err
	}
	if name == "" {
		if h.Typeflag == tar.TypeDir {
			m.root.header, m.root.layer = m.keepHeader(h, ""), layer
		}
		return nil, nil
	}
	dir, base := path.Split(name)
	if m.options.Whiteouts && strings.HasPrefix(base, whiteout) {
		return nil, m.takeAway(layer, dir, base)
	}
	parent, err := m.directory(layer, dir)
	if err != nil {
		return nil, err
	}
	switch h.Typeflag {
	case tar.TypeDir:
		m.putDirectory(parent, name, layer, h)
		return nil, nil
	case tar.TypeLink:
		return nil, m.putLink(parent, base, h)
	case tar.TypeSymlink:
		if h.Linkname == "" || len(h.Linkname) >= maxPath {
			return nil, fmt.Errorf("it is a symbolic link to %d bytes of name", len(h.Linkname))
		}
		parent.children[base] = &node{kind: symlink, layer: layer, target: h.Linkname}
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeChar, tar.TypeBlock, tar.TypeFifo, tar.TypeCont:
		parent.children[base] = &node{layer: layer}
	default:
		return nil, fmt.Errorf("its type %q is unknown", h.Typeflag)
	}
	return parent.children[base], nil
}

func (m *Merged) putDirectory(parent *node, name string, layer int, h *tar.Header) {
	base := path.Base(name)
	n := parent.children[base]
	if n == nil || n.kind != directory {
		n = newDirectory(layer)
		parent.children[base] = n
	}
	n.layer, n.header = layer, m.keepHeader(h, name)
}

// keepHeader keeps what a directory needs of its header.
func (m *Merged) keepHeader(h *tar.Header, name string) *tar.Header {
	return &tar.Header{
		Typeflag: tar.TypeDir, Mode: h.Mode, Uid: h.Uid, Gid: h.Gid, ModTime: h.ModTime, PAXRecords: m.attributes(name, h.PAXRecords),
	}
}

// attributes returns the records of the extended attributes that can be kept, as ext4 stores them.
func (m *Merged) attributes(name string, records map[string]string) map[string]string {
	kept, left := KeepAttributes(records)
	for _, attribute := range left {
		m.skip(name, "its attribute "+attribute+" has no room beside the others")
	}
	return kept
}

// putLink gives a file another name.
func (m *Merged) putLink(parent *node, base string, h *tar.Header) error {
	name, err := cleanName(h.Linkname)
	if err != nil {
		return fmt.Errorf("it is a hard link to %q: %w", h.Linkname, err)
	}
	dir, last := path.Split(name)
	from, err := m.find(dir)
	if err != nil || from == nil || from.children[last] == nil {
		return fmt.Errorf("it is a hard link to %q, which is not there before it", h.Linkname)
	}
	target := from.children[last]
	if target.kind == directory {
		return fmt.Errorf("it is a hard link to the directory %q", h.Linkname)
	}
	parent.children[base] = target
	return nil
}

// directory returns a directory, and makes it, and those above it, when it is not there.
func (m *Merged) directory(layer int, name string) (*node, error) {
	hops := 0
	n, _, err := m.resolve(name, &hops, func() (*node, error) { return newDirectory(layer), m.another() })
	return n, err
}

// find returns a directory by its name. nil: there is none. Anything else there is an error.
func (m *Merged) find(name string) (*node, error) {
	hops := 0
	n, _, err := m.resolve(name, &hops, nil)
	return n, err
}

// resolve finds a directory, and its path without links; symbolic links on the way are followed, as programs that unpack layers
// one above the other do. What is not there is made, unless create is nil: then there is no result. It goes through a name
// once: names of 2000 parts are as cheap as others.
func (m *Merged) resolve(name string, hops *int, create func() (*node, error)) (n *node, at []string, err error) {
	n = m.root
	for part := range strings.SplitSeq(name, "/") {
		if part == "" {
			continue
		}
		next := n.children[part]
		switch {
		case next == nil && create == nil:
			return nil, nil, nil
		case next == nil:
			if next, err = create(); err != nil {
				return nil, nil, err
			}
			n.children[part] = next
		case next.kind == symlink:
			if *hops++; *hops > maxHops {
				return nil, nil, fmt.Errorf("too many symbolic links on the way to %q", name)
			}
			to := next.target
			if !path.IsAbs(to) {
				to = strings.Join(at, "/") + "/" + to
			}
			if n, at, err = m.resolve(path.Clean("/"+to), hops, nil); err != nil {
				return nil, nil, err
			}
			if n == nil && create != nil { // a link to nowhere
				return nil, nil, fmt.Errorf("%q is no directory", part)
			}
			if n == nil {
				return nil, nil, nil
			}
			continue
		case next.kind == other:
			return nil, nil, fmt.Errorf("%q is no directory", path.Join(path.Join(at...), part))
		}
		n, at = next, append(at, part)
	}
	return n, at, nil
}

// takeAway removes what a whiteout hides: of lower layers, never of its own.
func (m *Merged) takeAway(layer int, dir, base string) error {
	parent, err := m.find(dir)
	if err != nil || parent == nil {
		return err
	}
	switch hidden, _ := strings.CutPrefix(base, whiteout); {
	case base == opaque:
		for name, n := range parent.children {
			if prune(n, layer) {
				delete(parent.children, name)
			}
		}
	case strings.HasPrefix(hidden, whiteout): // of aufs, for itself
	case parent.children[hidden] != nil && prune(parent.children[hidden], layer):
		delete(parent.children, hidden)
	}
	return nil
}

// prune removes all of lower layers from a file and tells whether nothing is left of it.
func prune(n *node, layer int) (gone bool) {
	for name, child := range n.children {
		if prune(child, layer) {
			delete(n.children, name)
		}
	}
	return n.layer < layer && len(n.children) == 0
}

// nameAll notes the paths of all files.
func (m *Merged) nameAll(dir *node, at string) {
	for _, name := range slices.Sorted(maps.Keys(dir.children)) {
		n, full := dir.children[name], path.Join(at, name)
		n.names = append(n.names, full)
		m.Files++
		if n.kind == directory {
			m.nameAll(n, full)
		}
	}
}

// Append has Write put text at the end of a regular file, on lines of its own. It tells whether there is such a file.
func (m *Merged) Append(name, text string) bool {
	dir, base := path.Split(name)
	parent, err := m.find(dir)
	if err != nil || parent == nil || parent.children[base] == nil || parent.children[base].kind != other {
		return false
	}
	if m.appended == nil {
		m.appended = map[*node]string{}
	}
	m.appended[parent.children[base]] = text
	return true
}

// maxAppended bounds a file that is appended to.
const maxAppended = 1 << 20

// withText returns a file's content with text behind it.
func withText(h *tar.Header, content io.Reader, text string) (io.Reader, error) {
	if h.Typeflag != tar.TypeReg || h.Size > maxAppended {
		return content, nil // a device, or nothing that people wrote
	}
	own, err := io.ReadAll(content)
	if err != nil {
		return nil, damaged(err)
	}
	if len(own) > 0 && own[len(own)-1] != '\n' {
		text = "\n" + text
	}
	h.Size = int64(len(own) + len(text))
	return io.MultiReader(bytes.NewReader(own), strings.NewReader(text)), nil
}

// Write writes the merged file system as a tar stream: all directories first, then the files in the order of the layers,
// each at once with its further names. progress, which may be nil, is told the bytes of content read so far of all.
func (m *Merged) Write(ctx context.Context, out io.Writer, progress func(done, all int64)) error {
	w := tar.NewWriter(out)
	if err := m.writeDirectories(w, m.root, ""); err != nil {
		return err
	}
	var done int64
	for i := range m.layers {
		if err := m.writeLayer(ctx, w, i, func(n int64) {
			if done += n; progress != nil {
				progress(done, m.Bytes)
			}
		}); err != nil {
			return err
		}
	}
	return w.Close()
}

func (m *Merged) writeDirectories(w *tar.Writer, dir *node, name string) error {
	h := dir.header
	if h == nil {
		h = &tar.Header{Typeflag: tar.TypeDir, Mode: 0o755}
	}
	if err := writeHeader(w, h, name+"/", h.PAXRecords); err != nil {
		return err
	}
	for _, base := range slices.Sorted(maps.Keys(dir.children)) {
		if child := dir.children[base]; child.kind == directory {
			if err := m.writeDirectories(w, child, path.Join(name, base)); err != nil {
				return err
			}
		}
	}
	return nil
}

func (m *Merged) writeLayer(ctx context.Context, w *tar.Writer, i int, passed func(int64)) (err error) {
	r, err := m.layers[i]()
	if err != nil {
		return err
	}
	defer closeAfter(r, &err)
	return walk(ctx, r, func(index int, h *tar.Header, content io.Reader) error {
		if index >= len(m.entries[i]) {
			return fault.New(fault.Precondition, "the archive changed while it was read")
		}
		passed(h.Size)
		n := m.entries[i][index]
		if n == nil || len(n.names) == 0 { // replaced or removed by what came later
			return nil
		}
		if text, ok := m.appended[n]; ok {
			if content, err = withText(h, content, text); err != nil {
				return err
			}
		}
		return m.writeFile(w, h, content, n.names)
	})
}

// writeFile writes a file with all its names.
func (m *Merged) writeFile(w *tar.Writer, h *tar.Header, content io.Reader, names []string) error {
	attributes := m.attributes(names[0], h.PAXRecords)
	var inside, outside []string
	for _, name := range names {
		if m.options.Apart != "" && strings.HasPrefix(name, m.options.Apart) {
			inside = append(inside, name)
		} else {
			outside = append(outside, name)
		}
	}
	if len(inside) == 0 || len(outside) == 0 {
		return writeLinked(w, h, content, names, attributes)
	}
	kept, err := os.CreateTemp(m.options.Dir, "shared-")
	if err != nil {
		return err
	}
	defer func() { _ = kept.Close() }()
	if err := os.Remove(kept.Name()); err != nil { // it is ours as long as it is open
		return err
	}
	again := *h
	if err := writeLinked(w, h, io.TeeReader(content, kept), outside, attributes); err != nil {
		return err
	}
	if _, err := kept.Seek(0, io.SeekStart); err != nil {
		return err
	}
	return writeLinked(w, &again, kept, inside, attributes)
}

func writeLinked(w *tar.Writer, h *tar.Header, content io.Reader, names []string, attributes map[string]string) error {
	if len(names) > maxLinks {
		return fault.New(fault.Precondition, "the file %q of the archive has %d names, more than a file can have", h.Name, len(names))
	}
	regular := false
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse, tar.TypeCont:
		h.Typeflag, regular = tar.TypeReg, true
	default:
		h.Size = 0
	}
	if err := writeHeader(w, h, names[0], attributes); err != nil {
		return err
	}
	if regular {
		if _, err := io.Copy(w, content); err != nil {
			return damaged(err)
		}
	}
	for _, name := range names[1:] {
		if err := writeHeader(w, &tar.Header{Typeflag: tar.TypeLink, Linkname: names[0]}, name, nil); err != nil {
			return err
		}
	}
	return nil
}

func writeHeader(w *tar.Writer, h *tar.Header, name string, attributes map[string]string) error {
	return w.WriteHeader(&tar.Header{
		Typeflag: h.Typeflag, Name: name, Linkname: h.Linkname, Size: h.Size, Mode: h.Mode & 0o7777, Uid: h.Uid, Gid: h.Gid,
		ModTime: h.ModTime, Devmajor: h.Devmajor, Devminor: h.Devminor, PAXRecords: attributes, Format: tar.FormatPAX,
	})
}
