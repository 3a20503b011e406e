package archive

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/klauspost/compress/zstd"
	"pgregory.net/rapid"

	"banger/internal/fault"
	"banger/internal/hosttest"
)

// member is one entry of an archive that a test makes.
type member struct {
	name, link, content string
	kind                byte // 0 is a regular file
	mode                int64
}

func tarOf(t testing.TB, members ...member) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, m := range members {
		kind, mode := m.kind, m.mode
		if kind == 0 {
			kind = tar.TypeReg
		}
		if mode == 0 {
			mode = 0o600
		}
		h := &tar.Header{Typeflag: kind, Name: m.name, Linkname: m.link, Mode: mode, Size: int64(len(m.content)), Uid: 4711}
		if kind == tar.TypeXGlobalHeader {
			h = &tar.Header{Typeflag: kind, PAXRecords: map[string]string{"comment": m.name}}
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

func gzipped(t testing.TB, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	w := gzip.NewWriter(&out)
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func zstded(t testing.TB, b []byte) []byte {
	t.Helper()
	w, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	return w.EncodeAll(b, nil)
}

// unpackInside unpacks into a directory whose surroundings are watched: nothing may appear or change there.
func unpackInside(t testing.TB, b []byte, l Limits) (dir string, err error) {
	t.Helper()
	around, err := os.MkdirTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	dir = filepath.Join(around, "in")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	outside := filepath.Join(around, "outside")
	if err := os.WriteFile(outside, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	err = Unpack(context.Background(), bytes.NewReader(b), dir, l)
	entries, readErr := os.ReadDir(around)
	content, fileErr := os.ReadFile(outside)
	if readErr != nil || fileErr != nil || len(entries) != 2 || string(content) != "mine" {
		t.Errorf("written outside: %v, %q (%v, %v)", entries, content, readErr, fileErr)
	}
	return dir, err
}

func TestUnpack(t *testing.T) {
	plain := tarOf(
		t, member{name: "./", kind: tar.TypeDir}, member{name: "a/", kind: tar.TypeDir, mode: 0o700}, member{name: "a/file", content: "text", mode: 0o4755},
		member{name: "deep/er/file", content: strings.Repeat("\x00", 1<<20) + "end"}, member{name: "a/link", kind: tar.TypeSymlink, link: "../deep/er/file"},
		member{name: "a/same", kind: tar.TypeLink, link: "a/file"}, member{name: "empty"},
		member{kind: tar.TypeXGlobalHeader, name: "0a1b2c3d"},
	)
	for what, b := range map[string][]byte{"plain": plain, "gzip": gzipped(t, plain), "zstd": zstded(t, plain), "garbage behind": append(bytes.Clone(plain), "garbage"...)} {
		dir, err := unpackInside(t, b, Limits{})
		if err != nil {
			t.Errorf("%s: %v", what, err)
			continue
		}
		info, err := os.Stat(filepath.Join(dir, "a/file"))
		if err != nil || info.Mode() != 0o755 {
			t.Errorf("%s: %v, %v", what, info, err)
		}
		for name, want := range map[string]int64{"a/same": 4, "a/link": 1<<20 + 3, "deep/er/file": 1<<20 + 3, "empty": 0} {
			if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Size() != want {
				t.Errorf("%s: %s: %v, %v", what, name, info, err)
			}
		}
		info, err = os.Stat(filepath.Join(dir, "deep/er/file"))
		if err != nil || info.Sys().(*syscall.Stat_t).Blocks*512 > 256<<10 {
			t.Errorf("%s: zeros take room: %v, %v", what, info, err)
		}
	}
}

func TestWant(t *testing.T) {
	b := tarOf(t, member{name: "x/yes", content: "1"}, member{name: "no/no", content: "2"})
	dir, err := unpackInside(t, b, Limits{Want: func(name string) bool { return name == "x/yes" }})
	if err != nil {
		t.Fatal(err)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 1 || entries[0].Name() != "x" {
		t.Errorf("%v, %v", entries, err)
	}
	hostile := tarOf(t, member{name: "../no", content: "2"})
	if _, err := unpackInside(t, hostile, Limits{Want: func(string) bool { return false }}); fault.KindOf(err) != fault.Precondition {
		t.Errorf("what is not wanted is not checked: %v", err)
	}
}

func TestHostileArchives(t *testing.T) {
	cases := map[string]struct {
		members []member
		text    string
	}{
		"parent":                   {[]member{{name: "../outside", content: "x"}}, "leads out"},
		"parent within":            {[]member{{name: "a/../../outside", content: "x"}}, "leads out"},
		"parent that comes back":   {[]member{{name: "a/../b", content: "x"}}, "leads out"},
		"absolute":                 {[]member{{name: "/tmp/outside", content: "x"}}, "leads out"},
		"newline":                  {[]member{{name: "a\nb", content: "x"}}, "characters"},
		"escape":                   {[]member{{name: "a\x1b[31m", content: "x"}}, "characters"},
		"no UTF-8":                 {[]member{{name: "a\xff", content: "x"}}, "characters"},
		"long":                     {[]member{{name: strings.Repeat("a/", 600) + "b", content: "x"}}, "bytes, the most"},
		"long part":                {[]member{{name: strings.Repeat("a", 300), content: "x"}}, "cannot unpack"},
		"absolute link":            {[]member{{name: "l", kind: tar.TypeSymlink, link: "/etc/passwd"}}, "leads out"},
		"link out":                 {[]member{{name: "a/l", kind: tar.TypeSymlink, link: "../../outside"}}, "leads out"},
		"hard link out":            {[]member{{name: "l", kind: tar.TypeLink, link: "../outside"}}, "leads out"},
		"hard link to nothing":     {[]member{{name: "l", kind: tar.TypeLink, link: "gone"}}, "cannot unpack"},
		"hard link to a link":      {[]member{{name: "s", kind: tar.TypeSymlink, link: "x"}, {name: "l", kind: tar.TypeLink, link: "s"}}, "is no file"},
		"through a link":           {[]member{{name: "s", kind: tar.TypeSymlink, link: "."}, {name: "s/f", content: "1"}, {name: "f", content: "2"}}, "twice"},
		"file over a link":         {[]member{{name: "f", content: "1"}, {name: "s", kind: tar.TypeSymlink, link: "f"}, {name: "s", content: "2"}}, "twice"},
		"twice":                    {[]member{{name: "f", content: "1"}, {name: "./f", content: "2"}}, "twice"},
		"directory that is a file": {[]member{{name: "f", content: "1"}, {name: "f/g", content: "2"}}, `holds "f" twice`},
		"character device":         {[]member{{name: "null", kind: tar.TypeChar}}, "neither a file"},
		"block device":             {[]member{{name: "sda", kind: tar.TypeBlock}}, "neither a file"},
		"fifo":                     {[]member{{name: "f", kind: tar.TypeFifo}}, "neither a file"},
		"a chain of links that ends outside": {[]member{
			{name: "a/b", kind: tar.TypeDir},
			{name: "x", kind: tar.TypeSymlink, link: "a/b"},
			{name: "y", kind: tar.TypeSymlink, link: "x/.."},
			{name: "z", kind: tar.TypeSymlink, link: "y/../.."},
		}, "leads out"},
		"a link whose way out is hidden": {[]member{
			{name: "a/b", kind: tar.TypeDir},
			{name: "c", kind: tar.TypeSymlink, link: "a/b"},
			{name: "d/e", kind: tar.TypeSymlink, link: "../c/../../outside"},
			{name: "d/e", content: "x"},
		}, ""},
		"a link that leads out by way of another": {[]member{
			{name: "p/q/s", kind: tar.TypeSymlink, link: "../.."}, {name: "t", kind: tar.TypeSymlink, link: "p/q/s/../outside"},
		}, "leads nowhere"},
		"a link to nothing": {[]member{{name: "l", kind: tar.TypeSymlink, link: "gone"}}, "leads nowhere"},
		"links in a circle": {[]member{{name: "a", kind: tar.TypeSymlink, link: "b"}, {name: "b", kind: tar.TypeSymlink, link: "a"}}, "leads nowhere"},
		"empty":             {nil, "empty"},
	}
	for what, c := range cases {
		t.Run(what, func(t *testing.T) {
			_, err := unpackInside(t, gzipped(t, tarOf(t, c.members...)), Limits{})
			if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), c.text) || strings.ContainsAny(err.Error(), "\n\x1b") {
				t.Errorf("%v", err)
			}
		})
	}
}

// A link that lies inside by its letters may lead out by way of another link. Writing through it does not.
func TestWritingThroughLinksStaysInside(t *testing.T) {
	b := tarOf(
		t, member{name: "a/b", kind: tar.TypeDir}, member{name: "c", kind: tar.TypeSymlink, link: "a/b"},
		member{name: "up", kind: tar.TypeSymlink, link: "a/b/../../../outside-dir"}, member{name: "up/file", content: "x"},
	)
	if _, err := unpackInside(t, b, Limits{}); fault.KindOf(err) != fault.Precondition {
		t.Errorf("%v", err)
	}
}

func TestLimits(t *testing.T) {
	many := make([]member, 20)
	for i := range many {
		many[i] = member{name: fmt.Sprint(i), content: strings.Repeat("x", 100)}
	}
	b := gzipped(t, tarOf(t, many...))
	for what, l := range map[string]Limits{"bytes": {Bytes: 1999}, "entries": {Files: 19}} {
		if _, err := unpackInside(t, b, l); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "more than") {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := unpackInside(t, b, Limits{Bytes: 2000, Files: 20}); err != nil {
		t.Errorf("at the limits: %v", err)
	}
	// A header may claim any size: what it claims counts.
	var claim bytes.Buffer
	if err := tar.NewWriter(&claim).WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "bomb", Size: 1 << 50}); err != nil {
		t.Fatal(err)
	}
	if _, err := unpackInside(t, claim.Bytes(), Limits{}); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a bomb: %v", err)
	}
}

func TestTruncatedAnywhere(t *testing.T) {
	plain := tarOf(t, member{name: "a", content: strings.Repeat("abc", 700)}, member{name: "b", content: "end"})
	for what, b := range map[string][]byte{"gzip": gzipped(t, plain), "zstd": zstded(t, plain)} {
		for n := 0; n < len(b); n += 1 + len(b)/60 {
			if _, err := unpackInside(t, b[:n], Limits{}); fault.KindOf(err) != fault.Precondition {
				t.Errorf("%s cut to %d of %d bytes: %v", what, n, len(b), err)
			}
		}
	}
	for n := 0; n < 512+2100; n += 97 { // within the first file
		if _, err := unpackInside(t, plain[:n], Limits{}); fault.KindOf(err) != fault.Precondition {
			t.Errorf("plain cut to %d bytes: %v", n, err)
		}
	}
}

// A bit that flipped anywhere in a compressed archive is found by the checksums of the compression, or hurts nothing.
func TestBitFlippedAnywhere(t *testing.T) {
	content := strings.Repeat("abc", 700)
	plain := tarOf(t, member{name: "a", content: content}, member{name: "b", content: "end"})
	for what, b := range map[string][]byte{"gzip": gzipped(t, plain), "zstd": zstded(t, plain)} {
		found := 0
		for i := range b {
			flipped := bytes.Clone(b)
			flipped[i] ^= 1 << (i % 8)
			dir, err := unpackInside(t, flipped, Limits{})
			if err != nil {
				if found++; fault.KindOf(err) != fault.Precondition {
					t.Errorf("%s, byte %d: %v", what, i, err)
				}
				continue
			}
			if got, err := os.ReadFile(filepath.Join(dir, "a")); err != nil || string(got) != content {
				t.Errorf("%s, byte %d: other content was taken (%v)", what, i, err)
			}
		}
		if found < len(b)*3/4 {
			t.Errorf("%s: %d of %d flips were found", what, found, len(b))
		}
	}
}

// FuzzUnpack: whatever comes, nothing is written outside, and what is wrong is the archive's fault.
func FuzzUnpack(f *testing.F) {
	plain := tarOf(f, member{name: "a/b", content: "text"}, member{name: "l", kind: tar.TypeSymlink, link: "a/b"})
	f.Add(plain)
	f.Add(gzipped(f, plain))
	f.Add(zstded(f, plain))
	f.Fuzz(func(t *testing.T, b []byte) {
		dir, err := unpackInside(t, b, Limits{Bytes: 1 << 20, Files: 100})
		if err != nil && fault.KindOf(err) != fault.Precondition {
			t.Errorf("%v", err)
		}
		err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
			if err == nil && d.Type()&^(fs.ModeDir|fs.ModeSymlink) != 0 {
				t.Errorf("%s is a %s", path, d.Type())
			}
			return err
		})
		if err != nil {
			t.Error(err)
		}
	})
}

func TestPackAndUnpack(t *testing.T) {
	rapid.Check(t, func(r *rapid.T) {
		from, err := os.MkdirTemp(t.TempDir(), "")
		if err != nil {
			r.Fatal(err)
		}
		contents := rapid.MapOfN(rapid.StringMatching(`[a-z]{1,8}(/[a-z]{1,8})?x`), rapid.SliceOfN(rapid.Byte(), 0, 300), 1, 5).Draw(r, "files")
		var entries []Entry
		for name, content := range contents {
			path := filepath.Join(from, strings.ReplaceAll(name, "/", "-"))
			if err := os.WriteFile(path, content, 0o755); err != nil {
				r.Fatal(err)
			}
			entries = append(entries, Entry{Name: "d/" + name + ".f", Path: path}, Entry{Name: "d/" + name + ".g", Data: content})
		}
		var first, second bytes.Buffer
		for _, b := range []*bytes.Buffer{&first, &second} {
			if err := Pack(t.Context(), b, entries); err != nil {
				r.Fatal(err)
			}
		}
		if !bytes.Equal(first.Bytes(), second.Bytes()) {
			r.Error("the same files gave other bytes")
		}
		dir, err := unpackInside(t, first.Bytes(), Limits{})
		if err != nil {
			r.Fatal(err)
		}
		for name, content := range contents {
			for _, suffix := range []string{".f", ".g"} {
				if got, err := os.ReadFile(filepath.Join(dir, "d", name+suffix)); err != nil || !bytes.Equal(got, content) {
					r.Errorf("%s: %q, %v", name, got, err)
				}
			}
		}
	})
}

func TestPackRefusesWhatIsNoFile(t *testing.T) {
	for _, path := range []string{t.TempDir(), "/nowhere", "/dev/null"} {
		if err := Pack(t.Context(), io.Discard, []Entry{{Name: "x", Path: path}}); fault.KindOf(err) != fault.Precondition {
			t.Errorf("%s: %v", path, err)
		}
	}
}

func TestInterruptedAndFull(t *testing.T) {
	b := tarOf(t, member{name: "a", content: strings.Repeat("x", 2<<20)})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Unpack(ctx, bytes.NewReader(b), t.TempDir(), Limits{}); fault.KindOf(err) != fault.Interrupted {
		t.Errorf("interrupted: %v", err)
	}
	err := Unpack(t.Context(), bytes.NewReader(b), hosttest.SmallDisk(t, 1<<20), Limits{})
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "no room to unpack a") {
		t.Errorf("full: %v", err)
	}
}
