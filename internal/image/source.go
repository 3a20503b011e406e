package image

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"

	"banger/internal/debian"
	"banger/internal/fault"
	"banger/internal/image/oci"
)

var errNoSpace error = syscall.ENOSPC

type sourceKind int

const (
	kindReference sourceKind = iota
	kindTar
	kindLayout
	kindDockerArchive
	kindLayoutArchive
	kindExt4
)

// source is what an import begins with.
type source struct {
	kind      sourceKind
	reference string // in full, of kindReference
	path      string // of the others
	packed    bool   // the archive is compressed
}

// title is how people call it.
func (s source) title() string {
	if s.reference != "" {
		return s.reference
	}
	return filepath.Base(s.path)
}

// recognize tells what a source is: by what lies at its path, else by its form.
func (s *Store) recognize(ctx context.Context, o ImportOptions) (source, error) {
	if !filepath.IsAbs(o.Source) {
		ref, err := oci.ParseReference(o.Source)
		return source{kind: kindReference, reference: ref}, err
	}
	info, err := os.Stat(o.Source)
	if errors.Is(err, os.ErrNotExist) {
		return source{}, fault.New(fault.NotFound, "there is no file %s", o.Source)
	}
	if err != nil {
		return source{}, fault.Wrap(fault.Precondition, err, "cannot import")
	}
	found := source{path: o.Source}
	switch {
	case info.IsDir() && oci.IsLayout(o.Source):
		found.kind = kindLayout
		return found, nil
	case info.IsDir():
		return found, fault.New(fault.Usage, "%s is a directory without an OCI layout in it", o.Source).
			WithHint("to import a root file system, make a tar of it: tar -C %s -c . | banger image import -", o.Source)
	case !info.Mode().IsRegular():
		return found, fault.New(fault.Usage, "%s is no file", o.Source)
	}
	f, err := os.Open(o.Source)
	if err != nil {
		return found, fault.Wrap(fault.Precondition, err, "cannot import")
	}
	defer func() { _ = f.Close() }()
	return recognizeFile(ctx, f, found)
}

// magic is a file format by bytes at a place in it.
type magic struct {
	at    int
	bytes string
}

// foreign are the formats that people may try, and what to do about them. Sources: the formats' own
// specifications, as file(1) collects them.
var foreign = []struct {
	magic
	what, hint string
}{
	{magic{0, "QFI\xfb"}, "a QCOW2 disk", "make a tar of its root file system, for instance with virt-tar-out"},
	{magic{0, "KDMV"}, "a VMDK disk", "make a tar of its root file system, for instance with virt-tar-out"},
	{magic{0, "hsqs"}, "a squashfs", "unpack it and make a tar: sqfs2tar FILE | banger image import -"},
	{magic{0x8001, "CD001"}, "an ISO image", "an installer is no image: install it somewhere, and make a tar of the result"},
	{magic{0, "PK\x03\x04"}, "a ZIP archive", "make a tar of it"},
	{magic{0, "7z\xbc\xaf\x27\x1c"}, "a 7z archive", "make a tar of it"},
	{magic{0, "XFSB"}, "an XFS file system", "make a tar of what is in it"},
	{magic{0x10040, "_BHRfS_M"}, "a btrfs file system", "make a tar of what is in it"},
	{magic{0, "!<arch>\n"}, "a package or library archive", "banger kernel import takes kernels from Debian packages"},
	{magic{0x1fe, "\x55\xaa"}, "a disk with partitions", "make a tar of its root file system, for instance with virt-tar-out"},
}

// headSize reaches behind the furthest magic.
const headSize = 0x10048

func recognizeFile(ctx context.Context, f *os.File, found source) (source, error) {
	head := make([]byte, headSize)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		return found, fault.Wrap(fault.Precondition, err, "cannot read %s", found.path)
	}
	head = head[:n]
	if n == 0 {
		return found, fault.New(fault.Usage, "%s is empty", found.path)
	}
	isTar := has(head, magic{257, "ustar"}) || debian.Packed(head)
	// ext4's superblock: Documentation/filesystems/ext4/super.rst. Its mark is two bytes, which anything packed may have there.
	if !isTar && has(head, magic{0x438, "\x53\xef"}) {
		found.kind = kindExt4
		return found, nil
	}
	if !isTar {
		for _, known := range foreign {
			if has(head, known.magic) {
				return found, fault.New(fault.Usage, "%s is %s, which cannot be imported", found.path, known.what).WithHint("%s", known.hint)
			}
		}
	}
	found.packed = debian.Packed(head)
	if _, err := f.Seek(0, io.SeekStart); err != nil {
		return found, err
	}
	var stream io.Reader = f
	if found.packed {
		r, err := debian.Decompress(f)
		if err != nil {
			return found, fault.Wrap(fault.Precondition, err, "%s is damaged", found.path)
		}
		defer func() { _ = r.Close() }()
		stream = r
	}
	kind, err := oci.KindOfArchive(ctx, stream)
	if fault.KindOf(err) == fault.Precondition && !isTar { // and not: the caller gave up
		return found, fault.New(fault.Usage, "%s is no tar archive, and nothing else that can be imported", found.path).
			WithHint("image import takes tar archives, container images and ext4 files")
	}
	if err != nil {
		return found, fault.Wrap(fault.KindOf(err), err, "%s", found.path)
	}
	found.kind = map[oci.Kind]sourceKind{
		oci.PlainTar: kindTar, oci.DockerArchive: kindDockerArchive, oci.LayoutArchive: kindLayoutArchive,
	}[kind]
	return found, nil
}

func has(head []byte, m magic) bool {
	return len(head) >= m.at+len(m.bytes) && bytes.Equal(head[m.at:m.at+len(m.bytes)], []byte(m.bytes))
}

// name names the new image. Without a wish it is called by its source, and by its content, so that the name never
// means another one; the source alone is an alias of the newest.
func (b *importing) name(m *Manifest) {
	short := plainName(b.source.title())
	m.Description = "imported from " + m.Source
	if b.source.path == "" || m.Source != b.source.title() {
		m.Aliases = referenceNames(m.Source)
		short = plainName(m.Aliases[len(m.Aliases)-1])
	}
	m.Name = b.options.Name
	if m.Name == "" {
		m.Name = short + "-" + strings.TrimPrefix(m.Digest, "sha256:")[:8]
		if b.source.path != "" {
			m.Aliases = append(m.Aliases, short)
		}
	}
}

// referenceNames are the names of an image with a reference, the shortest last: "docker.io/library/alpine:latest",
// "docker.io/library/alpine", "alpine".
func referenceNames(ref string) []string {
	names := []string{ref}
	bare, latest := strings.CutSuffix(ref, ":latest")
	if latest {
		names = append(names, bare)
	}
	if official, ok := strings.CutPrefix(bare, "docker.io/"); ok {
		names = append(names, official)
	}
	return append(names, bare[strings.LastIndex(bare, "/")+1:])
}

var (
	odd      = regexp.MustCompile(`[^a-z0-9._-]+`)
	suffixes = regexp.MustCompile(`\.(tar|tgz|txz|tzst|gz|xz|zst|bz2|ext4|img|raw)$`)
	goodName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$`)
)

// plainName makes a name of an image of any text.
func plainName(text string) string {
	if before, _, ok := strings.Cut(text, "@"); ok {
		text = before
	}
	for suffixes.MatchString(text) {
		text = suffixes.ReplaceAllString(text, "")
	}
	text = strings.Trim(odd.ReplaceAllString(strings.ToLower(text), "-"), "-._")
	if len(text) > 60 {
		text = strings.Trim(text[:60], "-._")
	}
	if text == "" || text == "default" {
		return "imported"
	}
	return text
}

func checkName(name string) error {
	if goodName.MatchString(name) && name != "default" {
		return nil
	}
	return fault.New(fault.Usage, "%q cannot name an image", name).
		WithHint("use letters, digits, dots, dashes and underscores, at most 100; the first a letter or digit")
}
