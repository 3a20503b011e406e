package image

import (
	"archive/tar"
	"bytes"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
)

// oddTar is a plain tar of what tars may hold and people seldom make: times far off, large numbers, the same name in several kinds,
// names that mean something in the layers of container images, or that are no text.
func oddTar(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	dir := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755} }
	file := func(name string) tar.Header { return tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644} }
	at := func(name string, when time.Time) tar.Header {
		h := file(name)
		h.ModTime = when
		return h
	}
	var headers []tar.Header
	for name, when := range farTimes {
		headers = append(headers, at(name, when), at("root/"+name, when))
	}
	headers = append(
		headers,
		tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "as git archive writes"}},
		file("file-to-dir"), dir("file-to-dir"), file("file-to-dir/in"),
		dir("dir-to-file"), file("dir-to-file/gone"), file("dir-to-file"),
		dir("real"), tar.Header{Typeflag: tar.TypeSymlink, Name: "link", Linkname: "real"}, file("link/through"), // a link on the way
		dir("link"), file("link/inside"), // and none any more
		file("real/.wh.through"), file("real/.wh..wh..opq"), // ordinary names here
		file("not-utf8-\xff\xfe"), file("root/not-utf8-\xff"), file("root/\"quoted\" \\ name"),
		tar.Header{Typeflag: tar.TypeFifo, Name: "fifo", Mode: 0o620, Uid: 4_000_000_000, Gid: 70_000},
		tar.Header{Typeflag: tar.TypeFifo, Name: "root/fifo", Mode: 0o620, Uid: 4_000_000_000, Gid: 70_000},
		tar.Header{Typeflag: tar.TypeSymlink, Name: "long", Linkname: strings.Repeat("0123456789/", 300)},
	)
	for _, h := range headers {
		h.Format = tar.FormatPAX
		if h.Typeflag == tar.TypeReg {
			h.Size = 1
		}
		if strings.Contains(h.Name, "\xff") { // PAX records are text
			h.Format = tar.FormatGNU
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte("x")[:h.Size]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// farTimes are times that do not fit 31 bits, as debugfs shows them.
var farTimes = map[string]time.Time{
	"1850": time.Date(1850, 1, 1, 0, 0, 0, 0, time.UTC),
	"1960": time.Date(1960, 5, 6, 7, 8, 9, 500_000_000, time.UTC),
	"1969": time.Unix(-1, 0),
	"2038": time.Unix(1<<31, 0),
	"2040": time.Date(2040, 5, 6, 7, 8, 9, 500_000_000, time.UTC),
	"2106": time.Unix(1<<32, 0),
	"2300": time.Date(2300, 1, 1, 0, 0, 0, 0, time.UTC),
	"9999": time.Date(9999, 1, 1, 0, 0, 0, 0, time.UTC),
}

func TestImportOddThings(t *testing.T) {
	needTools(t)
	s := Open(filepath.Join(t.TempDir(), "images"))
	i, err := s.Import(t.Context(), ImportOptions{Source: writeTemp(t, "odd.tar", oddTar(t)), Name: "odd"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(i.Manifest.Skipped) != 0 {
		t.Errorf("left out: %q", i.Manifest.Skipped)
	}
	for _, path := range []string{i.Root, i.WorkSeed} {
		if out, err := exec.Command(need.Binary(t, "e2fsck"), "-fn", path).CombinedOutput(); err != nil || strings.Contains(string(out), "Fix?") {
			t.Errorf("e2fsck: %v\n%s", err, out)
		}
		// What ext4 cannot tell is the nearest that it can: 1901-12-13 20:45:52 and 2446-05-10 22:38:55.
		for name, want := range map[string]string{
			"1850": "0x80000000:00000000", "1960": "0xedd689d9:", "1969": "0xffffffff:00000000", "2038": "0x80000000:00000001",
			"2040": "0x8450ffd9:77359401", "2106": "0x00000000:00000001", "2300": "0x6cb5db00:00000002", "9999": "0x7fffffff:00000003",
		} {
			if got := debugfs(t, path, "stat /"+name); !strings.Contains(got, "mtime: "+want) {
				t.Errorf("%s: %s of %s", want, got, path)
			}
		}
		// debugfs shows 32 bits as a signed number: it is 4000000000.
		if got := debugfs(t, path, "stat /fifo"); !strings.Contains(got, "Type: FIFO    Mode:  0620") || !strings.Contains(got, "User: -294967296   Group: 70000") {
			t.Errorf("/fifo: %s", got)
		}
	}
	for name, want := range map[string][]string{
		"/file-to-dir": {"in"}, "/real": {"through", ".wh.through", ".wh..wh..opq"}, "/link": {"inside"}, "/": {"not-utf8-\xff\xfe"},
	} {
		got := debugfs(t, i.Root, "ls -p "+name)
		for _, file := range want {
			if !strings.Contains(got, "/"+file+"/") {
				t.Errorf("there is no %s in %s: %s", file, name, got)
			}
		}
	}
	if got := debugfs(t, i.Root, "stat /dir-to-file"); !strings.Contains(got, "Type: regular") {
		t.Errorf("what was a directory first: %s", got)
	}
	if got := debugfs(t, i.Root, "stat /long"); !strings.Contains(got, "Type: symlink") || !strings.Contains(got, "Size: 3300") {
		t.Errorf("a long link: %s", got)
	}
	if got := debugfs(t, i.WorkSeed, "ls -p /"); !strings.Contains(got, "/not-utf8-\xff/") || !strings.Contains(got, `/"quoted" \ name/`) {
		t.Errorf("the work seed: %s", got)
	}
}

// Numbers that do not fit are refused: cut to 32 bits, this owner would be root.
func TestImportRefusesNumbers(t *testing.T) {
	needTools(t)
	s := Open(filepath.Join(t.TempDir(), "images"))
	for what, h := range map[string]tar.Header{
		"4294967296": {Typeflag: tar.TypeReg, Name: "su", Mode: 0o4755, Uid: 1 << 32},
		"-1":         {Typeflag: tar.TypeDir, Name: "d", Mode: 0o755, Gid: -1},
		"4294967295": {Typeflag: tar.TypeReg, Name: "root/none", Mode: 0o755, Gid: 1<<32 - 1},
		"5000:1":     {Typeflag: tar.TypeChar, Name: "dev/x", Devmajor: 5000, Devminor: 1},
	} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		_, err := s.Import(t.Context(), ImportOptions{Source: writeTemp(t, "n.tar", b.Bytes()), Name: "n"}, nil)
		if fault.KindOf(err) != fault.Precondition || !strings.Contains(fmt.Sprint(err), what) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
