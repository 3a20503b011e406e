package oci

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/tarball"

	"banger/internal/debian"
	"banger/internal/fault"
)

const syscallNoSpace = syscall.ENOSPC

// annotationName is where a layout keeps an image's name (OCI image specification, annotations.md).
const annotationName = "org.opencontainers.image.ref.name"

const (
	maxDepth     = 4       // of indexes within indexes
	maxMembers   = 100_000 // files in an archive with an image
	manifestFile = "manifest.json"
	notAFile     = -1
)

// IsLayout tells whether a directory is an OCI layout.
func IsLayout(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "oci-layout"))
	return err == nil
}

// OpenLayout opens the image in an OCI layout directory.
func OpenLayout(dir string, o Options) (*Image, error) {
	index, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		return nil, explainDamage(err)
	}
	found, err := pick(index, o, 0)
	if err != nil {
		return nil, err
	}
	if len(found) == 0 {
		return nil, fault.New(fault.Precondition, "the layout %s has no image for linux/%s", dir, o.Architecture)
	}
	if len(found) > 1 {
		return nil, several(dir, func(yield func(string)) {
			for _, f := range found {
				yield(f.name)
			}
		})
	}
	out, layers, err := describeStored(found[0].image, o)
	if err != nil {
		return nil, err
	}
	out.Reference = reference(found[0].name)
	return openAll(out, layers, v1.Layer.Compressed)
}

// reference returns a name in full when it is one of a registry: layouts often have only a tag there.
func reference(text string) string {
	if !strings.Contains(text, "/") {
		return ""
	}
	r, err := name.ParseReference(text)
	if err != nil {
		return ""
	}
	return canonical(r)
}

func several(file string, each func(func(string))) error {
	var names []string
	each(func(name string) {
		if name != "" {
			names = append(names, name)
		}
	})
	slices.Sort(names)
	return fault.New(fault.Usage, "%s holds several images", file).
		WithHint("say which one with --select: %s", strings.Join(slices.Compact(names), ", "))
}

type candidate struct {
	name  string
	image v1.Image
}

// pick finds the images of an index that fit.
func pick(index v1.ImageIndex, o Options, depth int) ([]candidate, error) {
	manifest, err := index.IndexManifest()
	if err != nil {
		return nil, explainDamage(err)
	}
	var found []candidate
	for _, d := range manifest.Manifests {
		title := d.Annotations[annotationName]
		if o.Select != "" && depth == 0 && title != o.Select && d.Digest.String() != o.Select || !fits(d, o) {
			continue
		}
		var inside []candidate
		switch {
		case d.MediaType.IsImage():
			i, err := index.Image(d.Digest)
			if err != nil {
				return nil, explainDamage(err)
			}
			inside = []candidate{{image: i}}
		case d.MediaType.IsIndex() && depth < maxDepth:
			deeper, err := index.ImageIndex(d.Digest)
			if err != nil {
				return nil, explainDamage(err)
			}
			if inside, err = pick(deeper, o, depth+1); err != nil {
				return nil, err
			}
		}
		for _, c := range inside {
			found = append(found, candidate{name: title, image: c.image})
		}
	}
	return found, nil
}

// fits tells whether an image is for this machine; those that say nothing are looked into later.
func fits(d v1.Descriptor, o Options) bool {
	if d.Annotations["vnd.docker.reference.type"] != "" { // an attestation beside the image
		return false
	}
	return d.Platform == nil || d.Platform.Architecture == "" || d.Platform.Satisfies(o.platform())
}

// Kind is what an archive is.
type Kind int

// The kinds of archive.
const (
	PlainTar      Kind = iota // a root file system
	DockerArchive             // what "docker save" writes
	LayoutArchive             // an OCI layout in a tar
)

var (
	savedFile = regexp.MustCompile(`^(sha256:)?[0-9a-f]{64}(\.json|\.tar|\.tar\.gz|/.*)?$`)
	savedBlob = regexp.MustCompile(`^blobs(/sha256(/[0-9a-f]{64})?)?$`)
)

// KindOfArchive looks at the names in an archive until they tell what it is.
func KindOfArchive(ctx context.Context, r io.Reader) (Kind, error) {
	kind, seen := PlainTar, 0
	for t := tar.NewReader(r); ; seen++ {
		if err := ctx.Err(); err != nil {
			return PlainTar, err
		}
		h, err := t.Next()
		if errors.Is(err, io.EOF) && seen > 0 {
			return kind, nil
		}
		if err != nil {
			return PlainTar, fault.Wrap(fault.Precondition, err, "the archive is damaged")
		}
		switch clean := strings.TrimPrefix(path.Clean("/"+h.Name), "/"); {
		case clean == manifestFile:
			return DockerArchive, nil
		case clean == "oci-layout" || clean == "index.json":
			kind = LayoutArchive
		case clean == "" || clean == "repositories" || savedFile.MatchString(clean) || savedBlob.MatchString(clean):
		default:
			return PlainTar, nil
		}
	}
}

// OpenDockerArchive opens an image of an unpacked archive as "docker save" writes it.
func OpenDockerArchive(file string, o Options) (*Image, error) {
	opener := func() (io.ReadCloser, error) { return os.Open(file) }
	if err := boundDocuments(file); err != nil {
		return nil, err
	}
	manifest, err := tarball.LoadManifest(opener)
	if err != nil {
		return nil, explainDamage(err)
	}
	var tag *name.Tag
	switch {
	case o.Select != "":
		t, err := name.NewTag(o.Select)
		if err != nil {
			return nil, fault.Wrap(fault.Usage, err, "--select")
		}
		tag = &t
	case len(manifest) > 1:
		return nil, several(filepath.Base(file), func(yield func(string)) {
			for _, d := range manifest {
				for _, t := range d.RepoTags {
					yield(t)
				}
			}
		})
	}
	found, err := tarball.Image(opener, tag)
	if err != nil {
		return nil, explainDamage(err)
	}
	out, layers, err := describe(found, o)
	if err != nil {
		return nil, err
	}
	if tag != nil {
		out.Reference = canonical(*tag)
	} else if len(manifest) == 1 && len(manifest[0].RepoTags) > 0 {
		out.Reference = reference(manifest[0].RepoTags[0])
	}
	// Not as they would be stored: these are not packed, and the library would pack them for us to unpack.
	return openAll(out, layers, v1.Layer.Uncompressed)
}

// boundDocuments refuses an archive with more in its documents than the library should read into memory: in the manifest, and in
// the configurations, which newer engines keep as blobs among the layers.
func boundDocuments(file string) error {
	f, err := os.Open(file)
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	sizes, manifest := map[string]int64{}, []byte(nil)
	for t := tar.NewReader(f); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err == nil && len(sizes) > maxMembers {
			err = fmt.Errorf("there are more than %d files in it", maxMembers)
		}
		if err != nil {
			return explainDamage(err)
		}
		if sizes[h.Name] = h.Size; h.Typeflag != tar.TypeReg {
			sizes[h.Name] = notAFile // the library follows links
		}
		if h.Name == manifestFile && h.Size <= maxDocument {
			if manifest, err = io.ReadAll(t); err != nil {
				return explainDamage(err)
			}
		}
	}
	var images []struct{ Config string }
	if err := json.Unmarshal(manifest, &images); sizes[manifestFile] <= maxDocument && err != nil {
		return explainDamage(err)
	}
	documents := []string{manifestFile}
	for _, i := range images {
		documents = append(documents, i.Config)
	}
	for _, name := range documents {
		switch size := sizes[name]; {
		case size == notAFile:
			return fault.New(fault.Precondition, "the image is damaged: %s in it is no regular file", name)
		case size > maxDocument:
			return fault.New(fault.Precondition, "the image is damaged: %s in it has %d bytes", name, size)
		}
	}
	return nil
}

// OpenLayoutArchive unpacks an OCI layout from an archive into o.Dir and opens it.
func OpenLayoutArchive(ctx context.Context, file string, o Options) (*Image, error) {
	dir := filepath.Join(o.Dir, "layout")
	if err := os.MkdirAll(filepath.Join(dir, "blobs/sha256"), 0o700); err != nil {
		return nil, err
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	for t := tar.NewReader(f); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, explainDamage(err)
		}
		clean := strings.TrimPrefix(path.Clean("/"+h.Name), "/")
		known := clean == "oci-layout" || clean == "index.json" || strings.HasPrefix(clean, "blobs/sha256/") && savedBlob.MatchString(clean)
		if h.Typeflag != tar.TypeReg || !known {
			continue
		}
		n, err := o.unpackTo(ctx, filepath.Join(dir, clean), t)
		if errors.Is(err, os.ErrExist) {
			err = fault.New(fault.Precondition, "the archive is damaged: %s is in it twice", clean)
		}
		if err != nil {
			return nil, err
		}
		if o.Room > 0 {
			o.Room = max(1, o.Room-n) // 0 would be no bound
		}
	}
	return OpenLayout(dir, o)
}

// Unpack writes an archive that is packed as a plain one to o.Dir and returns its path.
func Unpack(ctx context.Context, file string, o Options) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", err
	}
	defer func() { _ = f.Close() }()
	r, err := debian.Decompress(f)
	if err != nil {
		return "", explainDamage(err)
	}
	defer func() { _ = r.Close() }()
	plain := filepath.Join(o.Dir, "archive.tar")
	_, err = o.unpackTo(ctx, plain, r)
	return plain, err
}
