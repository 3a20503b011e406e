package oci

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/static"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"banger/internal/fault"
	"banger/internal/hosttest"
)

const testArchitecture = "amd64"

// member is a file of an archive; a link when it has a target.
type member struct{ name, content, target string }

// pack makes an archive.
func pack(t *testing.T, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		h := &tar.Header{Typeflag: tar.TypeReg, Name: m.name, Linkname: m.target, Mode: 0o644, Size: int64(len(m.content))}
		if m.target != "" {
			h.Typeflag = tar.TypeSymlink
		}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, m.content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// layers are what testImage is made of.
func layers(t *testing.T) [][]byte {
	t.Helper()
	return [][]byte{pack(t, member{name: "lower", content: strings.Repeat("content ", 2000)}), pack(t, member{name: "upper", content: "x"})}
}

// testImage is an image of two layers for a processor.
func testImage(t *testing.T, architecture, env string) v1.Image {
	t.Helper()
	i, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: architecture, Config: v1.Config{Env: []string{env}}})
	for _, content := range layers(t) {
		l, layerErr := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil })
		if err = errors.Join(err, layerErr); err == nil {
			i, err = mutate.AppendLayers(i, l)
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func tag(t *testing.T, text string) name.Tag {
	t.Helper()
	tag, err := name.NewTag(text)
	if err != nil {
		t.Fatal(err)
	}
	return tag
}

// layoutOf writes a layout with images, by their names.
func layoutOf(t *testing.T, images map[string]v1.Image) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	p, err := layout.Write(dir, empty.Index)
	for title, i := range images {
		if err == nil {
			err = p.AppendImage(i, layout.WithAnnotations(map[string]string{annotationName: title}))
		}
	}
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// archived packs a directory, each name with a prefix.
func archived(t *testing.T, dir, prefix string) []member {
	t.Helper()
	var members []member
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		content, err := os.ReadFile(path)
		inside, relErr := filepath.Rel(dir, path)
		members = append(members, member{name: prefix + inside, content: string(content)})
		return errors.Join(err, relErr)
	})
	if err != nil {
		t.Fatal(err)
	}
	return members
}

func saved(t *testing.T, images map[name.Tag]v1.Image) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "saved.tar")
	if err := tarball.MultiWriteToFile(path, images); err != nil {
		t.Fatal(err)
	}
	return path
}

func write(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "archive.tar")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// readAll reads all layers of an image to their ends.
func readAll(i *Image) (contents [][]byte, err error) {
	for _, open := range i.Layers {
		r, err := open()
		if err != nil {
			return nil, err
		}
		content, err := io.ReadAll(r)
		if err = errors.Join(err, r.Close()); err != nil {
			return nil, err
		}
		contents = append(contents, content)
	}
	return contents, nil
}

func checkImage(t *testing.T, i *Image, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	want := layers(t)
	for range 2 { // layers are read twice
		got, err := readAll(i)
		if err != nil || !slices.EqualFunc(got, want, bytes.Equal) {
			t.Errorf("%d layers, %v", len(got), err)
		}
	}
	if i.Reference != "example.org/team/box:1" || !slices.Equal(i.Env, []string{"A=1"}) {
		t.Errorf("%+v", i)
	}
}

// TestOpen: the same image from files of each kind. An image of its own manifest has its digest.
func TestOpen(t *testing.T) {
	image := testImage(t, testArchitecture, "A=1")
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Dir: t.TempDir(), Architecture: testArchitecture, Room: 10 << 20}
	dir := layoutOf(t, map[string]v1.Image{"example.org/team/box:1": image})
	t.Run("layout", func(t *testing.T) {
		i, err := OpenLayout(dir, o)
		checkImage(t, i, err)
		if !IsLayout(dir) || IsLayout(t.TempDir()) || i.Digest != digest.String() {
			t.Errorf("digest %s", i.Digest)
		}
	})
	t.Run("layout in an archive", func(t *testing.T) {
		members := append(archived(t, dir, "./"), member{name: "../outside", content: "x"}, member{name: "/etc/passwd", content: "x"},
			member{name: "blobs/sha256/../../../outside", content: "x"}, member{name: "blobs/sha256/two\nlines", content: "x"}, member{name: "oci-layout", target: "/etc/passwd"})
		i, err := OpenLayoutArchive(t.Context(), write(t, pack(t, members...)), o)
		checkImage(t, i, err)
		if entries, _ := os.ReadDir(o.Dir); len(entries) != 1 {
			t.Errorf("unpacked: %v", entries)
		}
	})
	t.Run("saved", func(t *testing.T) {
		i, err := OpenDockerArchive(saved(t, map[name.Tag]v1.Image{tag(t, "example.org/team/box:1"): image}), o)
		checkImage(t, i, err)
		if i.Digest != "" {
			t.Errorf("a digest that nobody gave it: %s", i.Digest)
		}
	})
	t.Run("saved and packed", func(t *testing.T) {
		content, err := os.ReadFile(saved(t, map[name.Tag]v1.Image{tag(t, "example.org/team/box:1"): image}))
		if err != nil {
			t.Fatal(err)
		}
		var b bytes.Buffer
		w := gzip.NewWriter(&b)
		if _, err := w.Write(content); err != nil || w.Close() != nil {
			t.Fatal(err)
		}
		plain, err := Unpack(t.Context(), write(t, b.Bytes()), o)
		if err != nil {
			t.Fatal(err)
		}
		i, err := OpenDockerArchive(plain, o)
		checkImage(t, i, err)
	})
}

// TestSelect: of several images the one that is named; those for other machines do not count.
func TestSelect(t *testing.T) {
	one, two, other := testImage(t, testArchitecture, "A=1"), testImage(t, testArchitecture, "A=2"), testImage(t, "s390x", "A=3")
	dir := layoutOf(t, map[string]v1.Image{"box:1": one, "box:2": two})
	file := saved(t, map[name.Tag]v1.Image{tag(t, "box:1"): one, tag(t, "box:2"): two})
	for kind, open := range map[string]func(o Options) (*Image, error){
		"layout": func(o Options) (*Image, error) { return OpenLayout(dir, o) },
		"saved":  func(o Options) (*Image, error) { return OpenDockerArchive(file, o) },
	} {
		if _, err := open(Options{Architecture: testArchitecture}); fault.KindOf(err) != fault.Usage || !strings.Contains(fault.HintOf(err), "box:1") {
			t.Errorf("%s, none named: %v, hint %q", kind, err, fault.HintOf(err))
		}
		if i, err := open(Options{Architecture: testArchitecture, Select: "box:2"}); err != nil || i.Env[0] != "A=2" {
			t.Errorf("%s, the second: %+v, %v", kind, i, err)
		}
		if _, err := open(Options{Architecture: testArchitecture, Select: "box:3"}); fault.KindOf(err) != fault.Precondition {
			t.Errorf("%s, one that is not there: %v", kind, err)
		}
	}
	if _, err := OpenDockerArchive(saved(t, map[name.Tag]v1.Image{tag(t, "box:1"): other}), Options{Architecture: testArchitecture}); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "s390x") {
		t.Errorf("another machine's: %v", err)
	}
}

func TestKindOfArchive(t *testing.T) {
	digest := strings.Repeat("0123456789abcdef", 4)
	for what, c := range map[string]struct {
		members []member
		kind    Kind
	}{
		"root file system":      {[]member{{name: "etc/passwd"}, {name: "manifest.json"}}, PlainTar},
		"saved":                 {[]member{{name: digest + "/layer.tar"}, {name: digest + ".json"}, {name: "manifest.json"}}, DockerArchive},
		"saved by new engines":  {[]member{{name: "blobs/sha256/" + digest}, {name: "index.json"}, {name: "oci-layout"}, {name: "manifest.json"}}, DockerArchive},
		"layout":                {[]member{{name: "./oci-layout"}, {name: "./index.json"}, {name: "./blobs/sha256/" + digest}}, LayoutArchive},
		"a file called so":      {[]member{{name: "oci-layout"}, {name: "etc/passwd"}}, PlainTar},
		"a name over two lines": {[]member{{name: digest + "\n.json"}}, PlainTar},
	} {
		if kind, err := KindOfArchive(t.Context(), bytes.NewReader(pack(t, c.members...))); err != nil || kind != c.kind {
			t.Errorf("%s: %v, %v", what, kind, err)
		}
	}
	for what, content := range map[string][]byte{"nothing": nil, "text": bytes.Repeat([]byte("text "), 500)} {
		if _, err := KindOfArchive(t.Context(), bytes.NewReader(content)); fault.KindOf(err) != fault.Precondition {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestRefuses: files that are damaged or want too much, and what is said of them.
func TestRefuses(t *testing.T) {
	image := testImage(t, testArchitecture, "A=1")
	o := Options{Dir: t.TempDir(), Architecture: testArchitecture}
	dir := layoutOf(t, map[string]v1.Image{"box:1": image})
	whole, err := os.ReadFile(saved(t, map[name.Tag]v1.Image{tag(t, "box:1"): image}))
	if err != nil {
		t.Fatal(err)
	}
	flipped := slices.Clone(whole)
	flipped[bytes.Index(flipped, []byte("\x1f\x8b"))+200] ^= 0xff
	foreign, err := mutate.AppendLayers(image, static.NewLayer([]byte("x"), types.DockerForeignLayer))
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigName()
	if err != nil {
		t.Fatal(err)
	}
	big := strings.Repeat(" ", maxDocument+1)
	twice := append(archived(t, dir, ""), member{name: "index.json", content: "{}"})
	readSaved := func(content []byte) error {
		i, err := OpenDockerArchive(write(t, content), o)
		if err == nil {
			_, err = readAll(i)
		}
		return err
	}
	for what, c := range map[string]struct {
		err  error
		says string
	}{
		"layer flipped":           {readSaved(flipped), "damaged"},
		"cut short":               {readSaved(whole[:len(whole)/2]), ""},
		"no manifest":             {readSaved(pack(t, member{name: "repositories", content: "{}"})), ""},
		"manifest without end":    {readSaved(pack(t, member{name: "manifest.json", content: big})), "manifest.json in it has"},
		"config without end":      {readSaved(pack(t, member{name: "c", content: big}, member{name: "manifest.json", content: `[{"Config":"c"}]`})), "c in it has"},
		"config is a link":        {readSaved(pack(t, member{name: "c", target: "d"}, member{name: "manifest.json", content: `[{"Config":"c"}]`})), "no regular file"},
		"layer from elsewhere":    {second(OpenLayout(layoutOf(t, map[string]v1.Image{"box:1": foreign}), o)), "cannot be read"},
		"layout says too much":    {second(OpenLayout(changed(t, dir, fmt.Sprintf(`"size":%d,"digest":"%s"`, configSize(t, image), config), fmt.Sprintf(`"size":%d,"digest":"%s"`, maxDocument+1, config)), o)), ""},
		"layout without blob":     {second(OpenLayout(without(t, dir, config.Hex), o)), "damaged"},
		"layout of other machine": {second(OpenLayout(dir, Options{Architecture: "s390x"})), ""},
		"a blob twice":            {second(OpenLayoutArchive(t.Context(), write(t, pack(t, twice...)), Options{Dir: t.TempDir(), Architecture: testArchitecture})), "twice"},
		"no room for a layout":    {second(OpenLayoutArchive(t.Context(), write(t, pack(t, archived(t, dir, "")...)), Options{Dir: t.TempDir(), Architecture: testArchitecture, Room: 600})), "no room"},
		"no room to unpack":       {unpackInto(t, 100), "no room"},
	} {
		if fault.KindOf(c.err) != fault.Precondition || !strings.Contains(c.err.Error(), c.says) {
			t.Errorf("%s: %v (%v)", what, c.err, fault.KindOf(c.err))
		}
	}
}

func second[T any](_ T, err error) error { return err }

func configSize(t *testing.T, i v1.Image) int64 {
	t.Helper()
	m, err := i.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return m.Config.Size
}

func unpackInto(t *testing.T, room int64) error {
	t.Helper()
	_, err := Unpack(t.Context(), write(t, bytes.Repeat([]byte("x"), 1000)), Options{Dir: t.TempDir(), Room: room})
	return err
}

// changed is a copy of a layout with a text in its blobs replaced.
func changed(t *testing.T, dir, old, replacement string) string {
	t.Helper()
	other := filepath.Join(t.TempDir(), "layout")
	if err := os.CopyFS(other, os.DirFS(dir)); err != nil {
		t.Fatal(err)
	}
	blobs, err := filepath.Glob(filepath.Join(other, "blobs/sha256/*"))
	if err != nil {
		t.Fatal(err)
	}
	found := false
	for _, path := range blobs {
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(content, []byte(old)) {
			continue
		}
		found = true
		if err := os.WriteFile(path, bytes.ReplaceAll(content, []byte(old), []byte(replacement)), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if !found {
		t.Fatalf("no blob has %s in it", old)
	}
	return other
}

// without is a copy of a layout that lacks a blob.
func without(t *testing.T, dir, hex string) string {
	t.Helper()
	other := filepath.Join(t.TempDir(), "layout")
	if err := errors.Join(os.CopyFS(other, os.DirFS(dir)), os.Remove(filepath.Join(other, "blobs/sha256", hex))); err != nil {
		t.Fatal(err)
	}
	return other
}

// TestFullDisk: a disk that fills up while an archive is unpacked.
func TestFullDisk(t *testing.T) {
	dir := hosttest.SmallDisk(t, 1<<20)
	_, err := Unpack(t.Context(), write(t, bytes.Repeat([]byte("x"), 4<<20)), Options{Dir: dir})
	if !errors.Is(err, syscallNoSpace) {
		t.Errorf("error %v", err)
	}
}

func TestParseReference(t *testing.T) {
	for text, want := range map[string]string{
		"alpine": "docker.io/library/alpine:latest", "docker.io/library/alpine:3.20": "docker.io/library/alpine:3.20", "localhost:5000/a/b": "localhost:5000/a/b:latest",
		"ghcr.io/a/b@sha256:" + strings.Repeat("a", 64): "ghcr.io/a/b@sha256:" + strings.Repeat("a", 64),
	} {
		if got, err := ParseReference(text); err != nil || got != want {
			t.Errorf("%s: %s, %v", text, got, err)
		}
	}
	for _, text := range []string{"", "not a reference", "../../etc", "a//b", "two\nlines", "UPPER", "a:b:c", "./x", "a@sha256:short", "a/../b"} {
		if got, err := ParseReference(text); fault.KindOf(err) != fault.Usage || fault.HintOf(err) == "" {
			t.Errorf("%q: %s, %v", text, got, err)
		}
	}
}
