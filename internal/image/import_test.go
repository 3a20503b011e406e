package image

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"log"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/klauspost/compress/zstd"

	"banger/internal/artifact"
	"banger/internal/fault"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

func needTools(t *testing.T) {
	t.Helper()
	for _, tool := range []string{"mke2fs", "debugfs", "e2fsck", "tune2fs", "resize2fs"} {
		need.Binary(t, tool)
	}
}

// boxTar is a small root file system with what is hard to keep.
func boxTar(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	put := func(h tar.Header, content string) {
		t.Helper()
		h.Size, h.Format = int64(len(content)), tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	put(tar.Header{Typeflag: tar.TypeReg, Name: "bin/box", Mode: 0o4755, Uid: 1000, Gid: 70000, PAXRecords: map[string]string{
		"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	}}, "program")
	put(tar.Header{Typeflag: tar.TypeLink, Name: "bin/sh", Linkname: "bin/box"}, "")
	put(tar.Header{Typeflag: tar.TypeReg, Name: "etc/old", Mode: 0o644}, "old")
	put(tar.Header{Typeflag: tar.TypeReg, Name: "etc/environment", Mode: 0o644}, "OWN=1\n")
	put(tar.Header{Typeflag: tar.TypeReg, Name: "etc/two\nlines", Mode: 0o644}, "x")
	put(tar.Header{Typeflag: tar.TypeReg, Name: "etc/" + strings.Repeat("n", 255), Mode: 0o644}, "x")
	put(tar.Header{Typeflag: tar.TypeChar, Name: "dev/null", Mode: 0o666, Devmajor: 1, Devminor: 3}, "")
	put(tar.Header{Typeflag: tar.TypeReg, Name: "root/.profile", Mode: 0o600}, "mine")
	put(tar.Header{Typeflag: tar.TypeLink, Name: "opt/shared", Linkname: "root/.profile"}, "")
	put(tar.Header{Typeflag: tar.TypeReg, Name: "etc/before-1970", Mode: 0o644, ModTime: time.Unix(-1e6, 0)}, "x") // e2fsck would say so
	put(tar.Header{Typeflag: tar.TypeReg, Name: "root/odd\nname", Mode: 0o600}, "x")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// upperTar is a layer above it.
func upperTar(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeReg, Name: "etc/.wh.old"}, {Typeflag: tar.TypeReg, Name: "etc/new", Mode: 0o644},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// boxImage is a container image of the two.
func boxImage(t *testing.T) v1.Image {
	t.Helper()
	image, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: runtime.GOARCH, Config: v1.Config{
		Env: []string{"PATH=/opt/bin:/bin", "QUOTED=it's", "HOME=/elsewhere", "BAD NAME=x", "TWO=a\nb"},
	}})
	if err != nil {
		t.Fatal(err)
	}
	for _, content := range [][]byte{boxTar(t), upperTar(t)} {
		l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil })
		if err != nil {
			t.Fatal(err)
		}
		if image, err = mutate.AppendLayers(image, l); err != nil {
			t.Fatal(err)
		}
	}
	return image
}

func writeTemp(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func gzipped(t *testing.T, content []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := w.Write(content); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func tag(t *testing.T, text string) name.Tag {
	t.Helper()
	tag, err := name.NewTag(text)
	if err != nil {
		t.Fatal(err)
	}
	return tag
}

// sources are all ways to give the box; containers tells whether the upper layer is in it.
func sources(t *testing.T) map[string]struct {
	path      string
	container bool
} {
	t.Helper()
	type source = struct {
		path      string
		container bool
	}
	plain := boxTar(t)
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	image := boxImage(t)
	saved := filepath.Join(t.TempDir(), "saved.tar")
	if err := tarball.WriteToFile(saved, tag(t, "example.org/team/box:1.0"), image); err != nil {
		t.Fatal(err)
	}
	savedBytes, err := os.ReadFile(saved)
	if err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "layout")
	p, err := layout.Write(dir, empty.Index)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AppendImage(image, layout.WithAnnotations(map[string]string{"org.opencontainers.image.ref.name": "example.org/team/box:1.0"})); err != nil {
		t.Fatal(err)
	}
	layoutTar, err := exec.Command("tar", "-C", dir, "-c", "oci-layout", "index.json", "blobs").Output()
	if err != nil {
		t.Fatal(err)
	}
	server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(server.Close)
	ref := strings.TrimPrefix(server.URL, "http://") + "/team/box:1.0"
	if err := remote.Write(tag(t, ref), image); err != nil {
		t.Fatal(err)
	}
	return map[string]source{
		"tar":            {writeTemp(t, "box.tar", plain), false},
		"tar.gz":         {writeTemp(t, "box.tar.gz", gzipped(t, plain)), false},
		"tar.zst":        {writeTemp(t, "box.tar.zst", encoder.EncodeAll(plain, nil)), false},
		"saved":          {saved, true},
		"saved.gz":       {writeTemp(t, "saved.tgz", gzipped(t, savedBytes)), true},
		"layout":         {dir, true},
		"layout archive": {writeTemp(t, "layout.tar", layoutTar), true},
		"registry":       {ref, true},
	}
}

func debugfs(t *testing.T, path, command string) string {
	t.Helper()
	out, err := exec.Command(need.Binary(t, "debugfs"), "-R", command, path).Output()
	if err != nil {
		t.Fatal(err)
	}
	return string(out)
}

func checkBox(t *testing.T, i Image, container bool) {
	t.Helper()
	for _, path := range []string{i.Root, i.WorkSeed} {
		if out, err := exec.Command(need.Binary(t, "e2fsck"), "-fn", path).CombinedOutput(); err != nil || strings.Contains(string(out), "Fix?") {
			t.Errorf("e2fsck: %v\n%s", err, out)
		}
	}
	if got := debugfs(t, i.Root, "stat /bin/box"); !strings.Contains(got, "Mode:  04755") || !strings.Contains(got, "User:  1000   Group: 70000") ||
		!strings.Contains(got, "Links: 2") || !strings.Contains(got, "security.capability (20)") {
		t.Errorf("/bin/box: %s", got)
	}
	if got := debugfs(t, i.Root, "stat /dev/null"); !strings.Contains(got, "Device major/minor number: 01:03") {
		t.Errorf("/dev/null: %s", got)
	}
	if got := debugfs(t, i.Root, "cat /opt/shared") + debugfs(t, i.WorkSeed, "cat /.profile"); got != "minemine" {
		t.Errorf("the file that was in /root and outside: %q", got)
	}
	if got := debugfs(t, i.Root, "ls -p /etc"); !strings.Contains(got, "two\nlines") || strings.Contains(got, "/old/") == container || strings.Contains(got, "/new/") != container {
		t.Errorf("/etc: %s", got)
	}
	environment, want := debugfs(t, i.Root, "cat /etc/environment"), "OWN=1\n"
	if container {
		want = "OWN=1\n# The environment that the image was made with.\nPATH=/opt/bin:/bin\nQUOTED=it's\n"
		if got := debugfs(t, i.Root, "cat /etc/profile.d/00-image.sh"); !strings.Contains(got, `export QUOTED='it'"'"'s'`) {
			t.Errorf("profile: %s", got)
		}
	}
	if environment != want {
		t.Errorf("environment: %q", environment)
	}
	if len(i.Manifest.Skipped) != 1 || !strings.Contains(i.Manifest.Skipped[0], "odd") {
		t.Errorf("left out: %q", i.Manifest.Skipped)
	}
}

func TestImport(t *testing.T) {
	needTools(t)
	s := Open(filepath.Join(t.TempDir(), "images"))
	digests := map[bool]string{} // one of all that bring the upper layer, one of all others
	for kind, source := range sources(t) {
		t.Run(kind, func(t *testing.T) {
			called := "as-" + strings.NewReplacer(" ", "-", ".", "-").Replace(kind)
			i, err := s.Import(t.Context(), ImportOptions{Source: source.path, Name: called}, nil)
			if err != nil {
				t.Fatal(err)
			}
			if i.Name != called {
				t.Errorf("name %s", i.Name)
			}
			checkBox(t, i, source.container)
			if digest := digests[source.container]; digest != "" && digest != i.Digest {
				t.Errorf("digest %s, of the same content %s", i.Digest, digest)
			}
			digests[source.container] = i.Digest
			if err := s.Verify(t.Context(), i.Name); err != nil {
				t.Error(err)
			}
			if entries, _ := os.ReadDir(i.Dir); len(entries) != 3 {
				t.Errorf("in its directory: %v", entries)
			}
		})
	}
	if left, _ := filepath.Glob(filepath.Join(s.shelf.Dir(""), ".new-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

// TestImportedNames: an image is called by its source and its content, and by its reference; what was imported before
// is not fetched again when that is asked for.
func TestImportedNames(t *testing.T) {
	needTools(t)
	s := Open(filepath.Join(t.TempDir(), "images"))
	all := sources(t)
	i, err := s.Import(t.Context(), ImportOptions{Source: all["saved"].path}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if want := "box-1.0-" + strings.TrimPrefix(i.Digest, "sha256:")[:8]; i.Name != want || i.Manifest.Source != "example.org/team/box:1.0" {
		t.Errorf("name %s, source %s", i.Name, i.Manifest.Source)
	}
	for _, alias := range []string{"example.org/team/box:1.0", "box:1.0"} {
		if got, err := s.Get(t.Context(), alias); err != nil || got.Name != i.Name {
			t.Errorf("Get(%q): %s, %v", alias, got.Name, err)
		}
	}
	ref := all["registry"].path
	first, err := s.Import(t.Context(), ImportOptions{Source: ref, Present: true}, nil)
	if err != nil {
		t.Fatal(err)
	}
	again, err := s.Import(t.Context(), ImportOptions{Source: ref, Present: true}, nil)
	if err != nil || again.Name != first.Name || !again.CreatedAt.Equal(first.CreatedAt) {
		t.Errorf("again: %s of %v, %v", again.Name, again.CreatedAt, err)
	}
	if _, err := s.Import(t.Context(), ImportOptions{Source: all["tar"].path, Name: i.Name}, nil); fault.KindOf(err) != fault.Conflict {
		t.Errorf("a name that is taken: %v", err)
	}
	for _, bad := range []string{"../x", "a/b", ".x", "-x", "default", "two\nlines", strings.Repeat("x", 101)} {
		if _, err := s.Import(t.Context(), ImportOptions{Source: all["tar"].path, Name: bad}, nil); fault.KindOf(err) != fault.Usage {
			t.Errorf("name %q: %v", bad, err)
		}
	}
}

func TestReferenceNames(t *testing.T) {
	for ref, want := range map[string][]string{
		"docker.io/library/alpine:latest": {"docker.io/library/alpine:latest", "docker.io/library/alpine", "library/alpine", "alpine"},
		"docker.io/library/alpine:3.20":   {"docker.io/library/alpine:3.20", "library/alpine:3.20", "alpine:3.20"},
		"ghcr.io/a/b/c:1":                 {"ghcr.io/a/b/c:1", "c:1"},
	} {
		if got := referenceNames(ref); !slices.Equal(got, want) {
			t.Errorf("%s: %q", ref, got)
		}
	}
}

// TestImportExt4 takes a file system that was used: with a journal, larger than it need be.
func TestImportExt4(t *testing.T) {
	needTools(t)
	tree := t.TempDir()
	for name, content := range map[string]string{"etc/hostname": "box\n", "root/kept": "x"} {
		if err := os.MkdirAll(filepath.Join(tree, filepath.Dir(name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(tree, name), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	path := filepath.Join(t.TempDir(), "disk.img")
	mke2fs := exec.Command(need.Binary(t, "mke2fs"), "-q", "-t", "ext4", "-d", tree, path, "300M")
	mke2fs.Env = append(os.Environ(), "E2FSPROGS_FAKE_TIME=1500000000")
	if out, err := mke2fs.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s := Open(filepath.Join(t.TempDir(), "images"))
	i, err := s.Import(t.Context(), ImportOptions{Source: path}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if i.RootBytes > 100<<20 || i.WorkSeed != "" || !strings.HasPrefix(i.Name, "disk-") || len(i.Manifest.Skipped) != 1 {
		t.Errorf("image %+v", i)
	}
	if out, err := exec.Command(need.Binary(t, "e2fsck"), "-fn", i.Root).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	if got := debugfs(t, i.Root, "cat /etc/hostname"); got != "box\n" {
		t.Errorf("/etc/hostname: %q", got)
	}
	t.Setenv("TZ", "UTC")
	got := debugfs(t, i.Root, "show_super_stats -h")
	if strings.Contains(got, "has_journal") {
		t.Error("it still has its journal")
	}
	// Created, written and checked when it was last touched, as two imports give the same.
	if strings.Count(got, "Fri Jul 14 02:40:00 2017") != 3 {
		t.Errorf("its times: %s", got)
	}
	if again, err := s.Import(t.Context(), ImportOptions{Source: path, Name: "again"}, nil); err != nil || again.Digest != i.Digest {
		t.Errorf("imported again: digest %s, %v; first %s", again.Digest, err, i.Digest)
	}
	// Cut short, it is refused.
	if err := os.Truncate(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	_, err = s.Import(t.Context(), ImportOptions{Source: path}, nil)
	if fault.KindOf(err) != fault.Precondition || fault.HintOf(err) != "repair it, or a copy of it, with: e2fsck -f "+path {
		t.Errorf("a file system cut short: %v, hint %q", err, fault.HintOf(err))
	}
}

// TestRecognizePacked: two bytes in the middle of a packed archive do not make it a file system.
func TestRecognizePacked(t *testing.T) {
	packed := gzipped(t, boxTar(t))
	// An extra field in the header of gzip (RFC 1952, 2.3.1), with the two bytes where ext4 has its own.
	extra := make([]byte, 2000)
	copy(extra[0x438-12:], "\x53\xef")
	packed = slices.Concat(packed[:3], []byte{packed[3] | 4}, packed[4:10], []byte{2000 & 0xff, 2000 >> 8}, extra, packed[10:])
	s := Open(filepath.Join(t.TempDir(), "images"))
	found, err := s.recognize(t.Context(), ImportOptions{Source: writeTemp(t, "box.tgz", packed)})
	if err != nil || found.kind != kindTar || !found.packed {
		t.Errorf("%+v, %v", found, err)
	}
}

// Who gives up while a file is looked at is not told that it is no archive.
func TestRecognizeInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s := Open(filepath.Join(t.TempDir(), "images"))
	for _, content := range [][]byte{boxTar(t), bytes.Repeat([]byte("nonsense "), 1000)} {
		if _, err := s.recognize(ctx, ImportOptions{Source: writeTemp(t, "x", content)}); fault.KindOf(err) != fault.Interrupted {
			t.Errorf("%v (%v)", err, fault.KindOf(err))
		}
	}
}

func TestImportRefuses(t *testing.T) {
	needTools(t)
	dir := filepath.Join(t.TempDir(), "images")
	s := Open(dir)
	plain := boxTar(t)
	packed := gzipped(t, plain)
	for what, c := range map[string]struct {
		source string
		kind   fault.Kind
		says   string
	}{
		"nothing there":     {"/nowhere/x.tar", fault.NotFound, "no file"},
		"empty":             {writeTemp(t, "e", nil), fault.Usage, "empty"},
		"nonsense":          {writeTemp(t, "n", bytes.Repeat([]byte("nonsense "), 1000)), fault.Usage, "no tar archive"},
		"plain directory":   {t.TempDir(), fault.Usage, "OCI layout"},
		"device":            {"/dev/null", fault.Usage, "no file"},
		"qcow2":             {writeTemp(t, "q", append([]byte("QFI\xfb"), make([]byte, 1000)...)), fault.Usage, "QCOW2"},
		"zip":               {writeTemp(t, "z", append([]byte("PK\x03\x04"), make([]byte, 1000)...)), fault.Usage, "ZIP"},
		"tar cut short":     {writeTemp(t, "t.tar", plain[:len(plain)/2+100]), fault.Precondition, "t.tar: the archive is damaged: unexpected EOF"},
		"packed, cut short": {writeTemp(t, "t.tgz", packed[:len(packed)/2]), fault.Precondition, "t.tgz: the archive is damaged: unexpected EOF"},
		"bad reference":     {"not a reference", fault.Usage, "no reference"},
		"reference upwards": {"../../etc", fault.Usage, "no reference"},
	} {
		t.Run(what, func(t *testing.T) {
			_, err := s.Import(t.Context(), ImportOptions{Source: c.source}, nil)
			if fault.KindOf(err) != c.kind || !strings.Contains(fmt.Sprint(err), c.says) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error %v (%v)", err, fault.KindOf(err))
			}
		})
	}
	if left, _ := filepath.Glob(filepath.Join(dir, ".new-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestCatalogue(t *testing.T) {
	needTools(t)
	s := Open(filepath.Join(t.TempDir(), "images"))
	path := writeTemp(t, "box.tar", boxTar(t))
	for _, name := range []string{"one", "two"} {
		if _, err := s.Import(t.Context(), ImportOptions{Source: path, Name: name}, nil); err != nil {
			t.Fatal(err)
		}
	}
	if told := s.Reconcile(); len(told) != 1 || !strings.Contains(told[0], "banger image default") {
		t.Errorf("without a default: %q", told)
	}
	if _, err := s.SetDefault(t.Context(), "one"); err != nil {
		t.Fatal(err)
	}
	if told := s.Reconcile(); len(told) != 0 {
		t.Errorf("all is well: %q", told)
	}
	unused := func(string) error { return nil }
	inUse := func(name string) error { return fault.New(fault.Conflict, "%s is in use", name) }
	if err := s.Delete(t.Context(), "one", unused); fault.KindOf(err) != fault.Conflict || !strings.Contains(fault.HintOf(err), "image default") {
		t.Errorf("the default image: %v", err)
	}
	if err := s.Delete(t.Context(), "two", inUse); fault.KindOf(err) != fault.Conflict {
		t.Errorf("an image in use: %v", err)
	}
	if i, err := s.Rename(t.Context(), "one", "three", unused); err != nil || i.Name != "three" || i.Manifest.Name != "three" {
		t.Errorf("renamed: %s, %v", i.Name, err)
	}
	if i, err := s.Get(t.Context(), ""); err != nil || i.Name != "three" {
		t.Errorf("the default image after its rename: %s, %v", i.Name, err)
	}
	if err := os.Remove(filepath.Join(s.shelf.Dir("three"), rootName)); err != nil {
		t.Fatal(err)
	}
	if told := s.Reconcile(); len(told) != 1 || !strings.Contains(told[0], "banger image default two") {
		t.Errorf("a default image without its file: %q", told)
	}
	if err := s.Delete(t.Context(), "two", unused); err != nil {
		t.Error(err)
	}
	if told := s.Reconcile(); len(told) != 1 || !strings.Contains(told[0], "banger image import box.tar") {
		t.Errorf("no sound image: %q", told)
	}
}

// TestOldLayout: an image of which there is only a file system, or a manifest that tells of other things.
func TestOldLayout(t *testing.T) {
	needTools(t)
	dir := filepath.Join(t.TempDir(), "images")
	s := Open(dir)
	made, err := s.Import(t.Context(), ImportOptions{Source: writeTemp(t, "box.tar", boxTar(t)), Name: "box"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, manifest := range map[string]string{"bare": "", "telling": `{"name": "telling", "kernel": "x", "description": "an old one"}`} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		root, err := os.ReadFile(made.Root)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name, "rootfs.ext4"), root, 0o600); err != nil {
			t.Fatal(err)
		}
		if manifest != "" {
			if err := os.WriteFile(filepath.Join(dir, name, manifestName), []byte(manifest), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		i, err := s.Get(t.Context(), name)
		if err != nil || i.Notice == "" || i.WorkSeed != "" || i.RootBytes == 0 || i.Digest == "" || i.Digest == artifact.Digest(nil) {
			t.Errorf("%s: %+v, %v", name, i, err)
		}
	}
	// One of this layout is damaged without its manifest, and not old.
	for what, manifest := range map[string][]byte{"torn": []byte(`{"na`), "empty": {}, "gone": nil} {
		if err := os.Mkdir(filepath.Join(dir, what), 0o700); err != nil {
			t.Fatal(err)
		}
		for name, content := range map[string][]byte{rootName: []byte("root"), seedName: []byte("seed"), manifestName: manifest} {
			if content == nil {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, what, name), content, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if i, err := s.Get(t.Context(), what); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("a manifest that is %s: %+v, %v", what, i, err)
		}
		if err := s.Delete(t.Context(), what, func(string) error { return nil }); err != nil {
			t.Errorf("delete of a damaged one: %v", err)
		}
	}
	list, err := s.List(t.Context())
	if err != nil || len(list) != 3 || slices.ContainsFunc(list, func(i Image) bool { return i.Problem != "" }) {
		t.Errorf("list %+v, %v", list, err)
	}
}

// TestNoRoom: that there is no room is said before anything large is written.
func TestNoRoom(t *testing.T) {
	dir := hosttest.SmallDisk(t, 4<<20)
	_, err := Open(filepath.Join(dir, "images")).Import(t.Context(), ImportOptions{Source: writeTemp(t, "box.tar", boxTar(t))}, nil)
	if fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Errorf("error %v, hint %q", err, fault.HintOf(err))
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "images/.new-*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}
