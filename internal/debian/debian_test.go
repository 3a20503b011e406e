package debian

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/blakesmith/ar"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
)

// makeDeb writes a .deb with the given files in it.
func makeDeb(t *testing.T, suffix string, pack func(io.Writer) io.WriteCloser, files map[string]string) string {
	t.Helper()
	var data bytes.Buffer
	packed := pack(&data)
	w := tar.NewWriter(packed)
	for name, content := range files {
		if err := w.WriteHeader(&tar.Header{Name: "./" + name, Typeflag: tar.TypeReg, Mode: 0o644, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := packed.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "x.deb")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	archive := ar.NewWriter(f)
	if err := archive.WriteGlobalHeader(); err != nil {
		t.Fatal(err)
	}
	for name, content := range map[string][]byte{"debian-binary": []byte("2.0\n"), "data.tar" + suffix: data.Bytes()} {
		if err := archive.WriteHeader(&ar.Header{Name: name, Size: int64(len(content)), Mode: 0o644}); err != nil {
			t.Fatal(err)
		}
		if _, err := archive.Write(content); err != nil {
			t.Fatal(err)
		}
	}
	return path
}

type nopCloser struct{ io.Writer }

func (nopCloser) Close() error { return nil }

func TestWalkDeb(t *testing.T) {
	must := func(w io.WriteCloser, err error) io.WriteCloser {
		if err != nil {
			t.Fatal(err)
		}
		return w
	}
	packers := map[string]func(io.Writer) io.WriteCloser{
		".xz":  func(w io.Writer) io.WriteCloser { x, err := xz.NewWriter(w); return must(x, err) },
		".zst": func(w io.Writer) io.WriteCloser { z, err := zstd.NewWriter(w); return must(z, err) },
		".gz":  func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) },
		"":     func(w io.Writer) io.WriteCloser { return nopCloser{w} },
	}
	for suffix, pack := range packers {
		path := makeDeb(t, suffix, pack, map[string]string{"boot/vmlinuz-1": "kernel", "usr/lib/x": "y"})
		got := map[string]string{}
		err := WalkDeb(t.Context(), path, func(h *tar.Header, content io.Reader) error {
			b, err := io.ReadAll(content)
			got[h.Name] = string(b)
			return err
		})
		if err != nil || got["boot/vmlinuz-1"] != "kernel" || got["usr/lib/x"] != "y" {
			t.Errorf("%q: %v, error %v", suffix, got, err)
		}
	}
}

func TestWalkDebOfBrokenPackage(t *testing.T) {
	path := makeDeb(t, ".gz", func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) }, map[string]string{"a": "b"})
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	nothing := func(*tar.Header, io.Reader) error { return nil }
	for _, n := range []int{0, 7, 100, len(whole) - 40} {
		if err := os.WriteFile(path, whole[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if err := WalkDeb(t.Context(), path, nothing); err == nil {
			// A stream may end early in its last, empty blocks; never before a file.
			if n < len(whole)-100 {
				t.Errorf("cut to %d bytes of %d: no error", n, len(whole))
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := os.WriteFile(path, whole, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := WalkDeb(ctx, path, nothing); fault.KindOf(err) != fault.Interrupted {
		t.Errorf("after the caller gave up: %v", err)
	}
}

func TestSourceLines(t *testing.T) {
	s := Source{}.WithDefaults("amd64")
	lines := s.Lines("/k.gpg")
	if len(lines) != 3 || lines[0] != "deb [signed-by=/k.gpg] http://deb.debian.org/debian trixie main" || !strings.Contains(lines[2], "trixie-security") {
		t.Errorf("default mirror: %q", lines)
	}
	s.Mirror = "http://localhost:3142/debian"
	if lines := s.Lines(""); !slices.Equal(lines, []string{"deb http://localhost:3142/debian trixie main"}) {
		t.Errorf("own mirror: %q", lines)
	}
	for _, bad := range []Source{
		{Mirror: "nowhere", Suite: "trixie", Architecture: "amd64"},
		{Mirror: "http://x/ [trusted=yes]", Suite: "trixie", Architecture: "amd64"},
		{Mirror: DefaultMirror, Suite: "trixie main\ndeb evil", Architecture: "amd64"},
	} {
		if err := bad.Check(); fault.KindOf(err) != fault.Usage {
			t.Errorf("%+v: %v", bad, err)
		}
	}
}

func TestHostOptions(t *testing.T) {
	dump := `Acquire "";
Acquire::http::Proxy "http://proxy:3128";
Acquire::https::Timeout "10";
Acquire::IndexTargets::deb::DEP-11::MetaKey "x";
Acquire::Check-Date "false";
Acquire::http::Bad "a"b";
acquire::Retries "5";
`
	want := []string{`Acquire::http::Proxy "http://proxy:3128";`, `Acquire::https::Timeout "10";`, `Acquire::Check-Date "false";`, `acquire::Retries "5";`}
	if got := hostOptions(dump); !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
}

func TestParsePackage(t *testing.T) {
	p := parsePackage("Package: a\nVersion: 1:2-3\nSize: 42\nDepends: linux-image-6 (= 6.1), b | c,d\nDescription: x\n more: text\n")
	if p.Name != "a" || p.Version != "1:2-3" || p.Size != 42 || !slices.Equal(p.Depends, []string{"linux-image-6", "b", "d"}) {
		t.Errorf("got %+v", p)
	}
}

// TestApt reads the real package lists through a private root.
func TestApt(t *testing.T) {
	if testing.Short() {
		t.Skip("fetches package lists")
	}
	source := Source{Mirror: need.Network(t)}.WithDefaults("amd64")
	need.Binary(t, "apt-get")
	apt, err := OpenApt(t.Context(), filepath.Join(t.TempDir(), `a b,c'd#e;f?g%20\é`), source)
	if err != nil {
		t.Fatal(err)
	}
	if err := apt.Update(t.Context()); err != nil {
		t.Fatal(err)
	}
	p, err := apt.Show(t.Context(), "linux-image-cloud-amd64")
	if err != nil || p.Version == "" || len(p.Depends) == 0 {
		t.Errorf("%+v, error %v", p, err)
	}
	small, err := apt.Show(t.Context(), "netbase")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		deb, err := apt.Download(t.Context(), small)
		if err != nil {
			t.Fatal(err)
		}
		found := false
		err = WalkDeb(t.Context(), deb, func(h *tar.Header, _ io.Reader) error {
			found = found || h.Name == "etc/services"
			return nil
		})
		if err != nil || !found {
			t.Errorf("no /etc/services in %s (%v)", deb, err)
		}
	}
	if err := apt.Forget(""); err != nil {
		t.Error(err)
	}
	if _, err := apt.Show(t.Context(), "no-such-package-at-all"); fault.KindOf(err) != fault.Precondition {
		t.Errorf("an unknown package: %v", err)
	}
}

func TestAptSaysWhenTheMirrorIsGone(t *testing.T) {
	need.Binary(t, "apt-get")
	apt, err := OpenApt(t.Context(), t.TempDir(), Source{Mirror: "file:///nonexistent/debian"}.WithDefaults("amd64"))
	if err != nil {
		t.Fatal(err)
	}
	if err := apt.Update(t.Context()); fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Errorf("error %v", err)
	}
}

// Packages of an archive that Debian did not sign are not taken.
func TestAptRefusesUnsignedArchives(t *testing.T) {
	need.Binary(t, "apt-get")
	mirror := t.TempDir()
	dist := filepath.Join(mirror, "dists/trixie")
	packages := "Package: evil\nVersion: 1\nArchitecture: amd64\nFilename: evil.deb\nSize: 1\nSHA256: " + strings.Repeat("0", 64) + "\n\n"
	sum := sha256.Sum256([]byte(packages))
	release := fmt.Sprintf("Origin: Debian\nSuite: trixie\nCodename: trixie\nArchitectures: amd64\nComponents: main\nDate: %s\nSHA256:\n %x %d main/binary-amd64/Packages\n",
		time.Now().UTC().Format("Mon, 02 Jan 2006 15:04:05 UTC"), sum, len(packages))
	for name, content := range map[string]string{"main/binary-amd64/Packages": packages, "Release": release} {
		path := filepath.Join(dist, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	apt, err := OpenApt(t.Context(), t.TempDir(), Source{Mirror: "file://" + mirror}.WithDefaults("amd64"))
	if err != nil {
		t.Fatal(err)
	}
	if err := apt.Update(t.Context()); err == nil || !strings.Contains(err.Error(), "not signed") {
		t.Errorf("error %v", err)
	}
	if p, err := apt.Show(t.Context(), "evil"); err == nil {
		t.Errorf("the unsigned list was taken: %+v", p)
	}
}

func TestAptSaysWhereItCannotWork(t *testing.T) {
	_, err := OpenApt(t.Context(), filepath.Join(t.TempDir(), `a"b`), Source{}.WithDefaults("amd64"))
	if fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Errorf("error %v", err)
	}
}
