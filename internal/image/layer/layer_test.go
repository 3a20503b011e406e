package layer

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"banger/internal/disk"
	"banger/internal/fault"
)

// dir, file and link make headers; what is told of a file is its content.
func dir(name string) tar.Header { return tar.Header{Typeflag: tar.TypeDir, Name: name, Mode: 0o755} }

func link(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeLink, Name: name, Linkname: target}
}

func sym(name, target string) tar.Header {
	return tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target}
}

type file struct{ name, content string }

// pack makes a layer of headers, and of files with their content.
func pack(t testing.TB, entries ...any) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, e := range entries {
		h, content := tar.Header{}, ""
		switch e := e.(type) {
		case tar.Header:
			h = e
		case file:
			h, content = tar.Header{Typeflag: tar.TypeReg, Name: e.name, Mode: 0o644, Size: int64(len(e.content))}, e.content
		}
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func opener(content []byte) Layer {
	return func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil }
}

// flatten merges layers and renders the result, a line a file, in order of names.
func flatten(ctx context.Context, o Options, layers ...[]byte) (string, error) {
	var all []Layer
	for _, l := range layers {
		all = append(all, opener(l))
	}
	m, err := Merge(ctx, o, all...)
	if err != nil {
		return "", err
	}
	var b bytes.Buffer
	if err := m.Write(ctx, &b, nil); err != nil {
		return "", err
	}
	return render(&b)
}

// render also finds what no writer of a file system could take: a file before its directory, a link before its
// target, a name that is there twice.
func render(r io.Reader) (string, error) {
	seen := map[string]bool{}
	var lines []string
	for t := tar.NewReader(r); ; {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			slices.Sort(lines)
			return strings.Join(lines, "\n"), nil
		}
		if err != nil {
			return "", err
		}
		content, err := io.ReadAll(t)
		if err != nil {
			return "", err
		}
		name := strings.Trim(h.Name, "/")
		parent := strings.TrimPrefix(path.Dir("/"+name), "/")
		if seen[name] || !seen[parent] && name != "" {
			return "", fmt.Errorf("%q is there twice or before its directory", name)
		}
		seen[name] = true
		switch h.Typeflag {
		case tar.TypeDir:
			if name != "" {
				lines = append(lines, name+"/")
			}
		case tar.TypeLink:
			if !seen[h.Linkname] {
				return "", fmt.Errorf("link %q before its target %q", name, h.Linkname)
			}
			lines = append(lines, name+" = "+h.Linkname)
		case tar.TypeSymlink:
			lines = append(lines, name+" -> "+h.Linkname)
		default:
			lines = append(lines, name+" "+string(content))
		}
	}
}

func TestMerge(t *testing.T) {
	base := pack(t, dir("./"), dir("etc/"), file{"etc/a", "1"}, file{"etc/b", "1"}, dir("var/"), dir("var/cache/"), file{"var/cache/x", "1"})
	for name, c := range map[string]struct {
		layers [][]byte
		want   string
	}{
		"one layer":              {[][]byte{base}, "etc/\netc/a 1\netc/b 1\nvar/\nvar/cache/\nvar/cache/x 1"},
		"replaced":               {[][]byte{base, pack(t, file{"etc/a", "2"})}, "etc/\netc/a 2\netc/b 1\nvar/\nvar/cache/\nvar/cache/x 1"},
		"whiteout":               {[][]byte{base, pack(t, file{"etc/.wh.a", ""}, file{"var/.wh.cache", ""})}, "etc/\netc/b 1\nvar/"},
		"opaque":                 {[][]byte{base, pack(t, file{"etc/c", "2"}, file{"etc/.wh..wh..opq", ""})}, "etc/\netc/c 2\nvar/\nvar/cache/\nvar/cache/x 1"},
		"taken away and back":    {[][]byte{base, pack(t, file{"var/.wh.cache", ""}), pack(t, dir("var/cache/"), file{"var/cache/y", "3"})}, "etc/\netc/a 1\netc/b 1\nvar/\nvar/cache/\nvar/cache/y 3"},
		"own file kept":          {[][]byte{base, pack(t, dir("var/cache/"), file{"var/cache/y", "2"}, file{"var/.wh.cache", ""})}, "etc/\netc/a 1\netc/b 1\nvar/\nvar/cache/\nvar/cache/y 2"},
		"directory becomes file": {[][]byte{base, pack(t, file{"var", "2"})}, "etc/\netc/a 1\netc/b 1\nvar 2"},
		"file becomes directory": {[][]byte{base, pack(t, dir("etc/a/"), file{"etc/a/x", "2"})}, "etc/\netc/a/\netc/a/x 2\netc/b 1\nvar/\nvar/cache/\nvar/cache/x 1"},
		"twice in one":           {[][]byte{pack(t, file{"a", "1"}, file{"a", "2"}, file{"./a", "3"})}, "a 3"},
		"implied directories":    {[][]byte{pack(t, file{"/opt/x/y", "1"})}, "opt/\nopt/x/\nopt/x/y 1"},
		"hard links":             {[][]byte{pack(t, file{"b", "1"}, link("a", "b"), link("c", "./a"))}, "a 1\nb = a\nc = a"},
		"link outlives its name": {[][]byte{pack(t, file{"b", "1"}, link("a", "b")), pack(t, file{"b", "2"})}, "a 1\nb 2"},
		"link to a lower layer":  {[][]byte{pack(t, file{"b", "1"}), pack(t, link("c", "b"), file{"d", "2"})}, "b 1\nc = b\nd 2"},
		"through a symlink":      {[][]byte{pack(t, dir("usr/"), dir("usr/lib/"), sym("lib", "usr/lib")), pack(t, file{"lib/x", "2"})}, "lib -> usr/lib\nusr/\nusr/lib/\nusr/lib/x 2"},
		"links on links":         {[][]byte{pack(t, dir("a/b/"), sym("a/up", "../c"), dir("c/"), sym("c/l", "../a/b"), file{"a/up/l/new/x", "1"})}, "a/\na/b/\na/b/new/\na/b/new/x 1\na/up -> ../c\nc/\nc/l -> ../a/b"},
		"symlink beyond root":    {[][]byte{pack(t, dir("etc/"), sym("up", "../../../etc")), pack(t, file{"up/x", "2"})}, "etc/\netc/x 2\nup -> ../../../etc"},
		"odd names":              {[][]byte{pack(t, file{"two\nlines", "1"}, file{" \"quoted\" \\", "2"}, file{strings.Repeat("n", 255), "3"})}, " \"quoted\" \\ 2\n" + strings.Repeat("n", 255) + " 3\ntwo\nlines 1"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := flatten(t.Context(), Options{Whiteouts: true}, c.layers...)
			if err != nil || got != c.want {
				t.Errorf("error %v, got:\n%s\nwant:\n%s", err, got, c.want)
			}
		})
	}
}

func TestWithoutWhiteouts(t *testing.T) {
	if got, err := flatten(t.Context(), Options{}, pack(t, file{".wh.a", "1"})); err != nil || got != ".wh.a 1" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestApart: a file with names on both sides is there on both, and keeps its links on each.
func TestApart(t *testing.T) {
	layer := pack(t, dir("root/"), dir("opt/"), file{"root/a", "1"}, link("opt/b", "root/a"), link("root/c", "root/a"), link("opt/d", "root/a"))
	got, err := flatten(t.Context(), Options{Apart: "root/", Dir: t.TempDir()}, layer)
	if want := "opt/\nopt/b 1\nopt/d = opt/b\nroot/\nroot/a 1\nroot/c = root/a"; err != nil || got != want {
		t.Errorf("error %v, got:\n%s", err, got)
	}
}

// TestBackups: GNU tar's labels and dumped directories are understood, files in parts are not.
func TestBackups(t *testing.T) {
	const names = "Ya\x00\x00"
	dumped := pack(t, tar.Header{Typeflag: volumeLabel, Name: "Friday"}, file{"d", names}, file{"d/a", "x"})
	// The writer knows no such type: 'D' is put in, and the header's sum (POSIX, ustar: the bytes at 148) grows by the difference.
	at := bytes.Index(dumped, []byte("d\x00"))
	sum, err := strconv.ParseInt(string(bytes.Trim(dumped[at+148:at+156], " \x00")), 8, 64)
	if err != nil {
		t.Fatal(err)
	}
	copy(dumped[at+148:], fmt.Sprintf("%06o\x00 ", sum+dumpedDir-int64(dumped[at+156])))
	dumped[at+156] = dumpedDir
	got, err := flatten(t.Context(), Options{}, dumped)
	if want := "d/\nd/a x"; err != nil || got != want {
		t.Errorf("error %v, got:\n%s", err, got)
	}
	_, err = flatten(t.Context(), Options{}, pack(t, tar.Header{Typeflag: restOfFile, Name: "a"}))
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(fmt.Sprint(err), "another volume") {
		t.Error(err)
	}
}

func TestHostileArchives(t *testing.T) {
	whole := pack(t, file{"a", strings.Repeat("content", 500)}, file{"b", "x"})
	flipped := slices.Clone(whole)
	flipped[20] ^= 1
	var deep []any
	for i := range 100 {
		deep = append(deep, sym(fmt.Sprintf("l%d", i), fmt.Sprintf("l%d", i+1)))
	}
	many := make([]any, 50)
	for i := range many {
		many[i] = file{fmt.Sprint(i), ""}
	}
	for name, c := range map[string]struct {
		archive []byte
		says    string
	}{
		"cut short":         {whole[:2000], "damaged"},
		"bit flipped":       {flipped, "damaged"},
		"no archive":        {bytes.Repeat([]byte("x"), 2000), "damaged"},
		"leads out":         {pack(t, file{"../../etc/passwd", "x"}), "leads out"},
		"leads out inside":  {pack(t, file{"a/../../x", "x"}), "leads out"},
		"link leads out":    {pack(t, link("a", "../../etc/shadow")), "leads out"},
		"dangling link":     {pack(t, link("a", "b")), "not there"},
		"link to directory": {pack(t, dir("d/"), link("a", "d")), "directory"},
		"long name":         {pack(t, file{strings.Repeat("n", 256), "x"}), "255"},
		"long path":         {pack(t, file{strings.Repeat("dddddddd/", 600) + "f", "x"}), "4096"},
		"below a file":      {pack(t, file{"a", "x"}, file{"a/b", "x"}), "no directory"},
		"link to nowhere":   {pack(t, sym("a", "nowhere"), file{"a/x", "x"}), "no directory"},
		"circle of links":   {pack(t, sym("a", "b"), sym("b", "a"), file{"a/x", "x"}), "symbolic links"},
		"chain of links":    {pack(t, append(deep, file{"l0/x", "x"})...), "symbolic links"},
		"too many bytes":    {pack(t, file{"a", strings.Repeat("x", 5000)}), "bytes"},
		"too many entries":  {pack(t, many...), "entries"},
		"implied entries":   {pack(t, file{strings.Repeat("d/", 300) + "f", "x"}), "entries"},
		"endless":           {append(pack(t, file{"a", "x"}), make([]byte, maxTrailer+1)...), "behind its end"},
	} {
		t.Run(name, func(t *testing.T) {
			o := Options{MaxBytes: 4500, MaxEntries: 200}
			if name == "too many entries" {
				o.MaxEntries = 40
			}
			_, err := flatten(t.Context(), o, c.archive)
			if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestWhatBelongsToFiles: owners, modes, times, devices and attributes arrive.
func TestWhatBelongsToFiles(t *testing.T) {
	h := tar.Header{
		Typeflag: tar.TypeChar, Name: "null", Mode: 0o4666, Uid: 1000, Gid: 70000, Devmajor: 1, Devminor: 3, ModTime: time.Unix(1e9, 5), Format: tar.FormatPAX,
		PAXRecords: map[string]string{
			"SCHILY.xattr.user.a": "b", "SCHILY.xattr.trusted.overlay.opaque": "y", "SCHILY.xattr.com.apple.x": "y", "LIBARCHIVE.creationtime": "1",
			// An entry of a user by its id, and one of the owner, as programs see them.
			"SCHILY.xattr.system.posix_acl_access": "\x02\x00\x00\x00" + "\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x05\x00\xe8\x03\x00\x00",
		},
	}
	m, err := Merge(t.Context(), Options{}, opener(pack(t, h)))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := m.Write(t.Context(), &b, nil); err != nil {
		t.Fatal(err)
	}
	r := tar.NewReader(&b)
	if _, err := r.Next(); err != nil { // the root
		t.Fatal(err)
	}
	got, err := r.Next()
	if err != nil {
		t.Fatal(err)
	}
	if got.Mode != h.Mode || got.Uid != h.Uid || got.Gid != h.Gid || got.Devmajor != 1 || got.Devminor != 3 || !got.ModTime.Equal(h.ModTime) {
		t.Errorf("%+v", got)
	}
	if r := got.PAXRecords; r["SCHILY.xattr.user.a"] != "b" || r["SCHILY.xattr.trusted.overlay.opaque"] != "" || r["SCHILY.xattr.com.apple.x"] != "" ||
		r["SCHILY.xattr.system.posix_acl_access"] != "\x01\x00\x00\x00"+"\x01\x00\x07\x00"+"\x02\x00\x05\x00\xe8\x03\x00\x00" {
		t.Errorf("records %q", r)
	}
}

// TestDirectoriesInTheEnd: what file systems are mounted on is a directory, and what had its place is told of.
func TestDirectoriesInTheEnd(t *testing.T) {
	o := Options{Directories: []string{"root", "proc", "dev", "run"}}
	layers := pack(t, dir("var/"), sym("root", "/var/roothome"), file{"proc", "x"}, dir("dev/"), file{"etc", "x"})
	m, err := Merge(t.Context(), o, opener(layers))
	if err != nil {
		t.Fatal(err)
	}
	if got, want := m.Skipped(), []string{
		`"/root": it is a symbolic link to "/var/roothome" and has to be a directory`, `"/proc": it has to be a directory`,
	}; !slices.Equal(got, want) {
		t.Errorf("left out: %q", got)
	}
	if got, err := flatten(t.Context(), o, layers); err != nil || got != "dev/\netc x\nproc/\nroot/\nvar/" {
		t.Errorf("%v, got:\n%s", err, got)
	}
}

// TestAttributesWithoutRoom: attributes that a file of ext4 has no room for are left out, and told of; a file of many is not
// told of without end.
func TestAttributesWithoutRoom(t *testing.T) {
	big := map[string]string{"SCHILY.xattr.user.a": strings.Repeat("a", 4000), "SCHILY.xattr.user.b": strings.Repeat("b", 4000), "SCHILY.xattr.user.c": "c"}
	entries := []any{tar.Header{Typeflag: tar.TypeDir, Name: ".config/", PAXRecords: big}}
	for i := range disk.MaxLeftOut + 5 {
		entries = append(entries, tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprint(i), PAXRecords: big})
	}
	m, err := Merge(t.Context(), Options{}, opener(pack(t, entries...)))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	if err := m.Write(t.Context(), &b, nil); err != nil {
		t.Fatal(err)
	}
	for r, seen := tar.NewReader(&b), 0; ; seen++ {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if got := h.PAXRecords; seen > 0 && (got["SCHILY.xattr.user.a"] == "" || got["SCHILY.xattr.user.b"] != "" || got["SCHILY.xattr.user.c"] != "c") {
			t.Errorf("%s: %d attributes", h.Name, len(got))
		}
	}
	got := m.Skipped()
	if len(got) != disk.MaxLeftOut+1 || got[0] != `"/.config": its attribute user.b has no room beside the others` || got[disk.MaxLeftOut] != "and 6 more" {
		t.Errorf("%d lines: %q", len(got), got[:2])
	}
}

// TestRandomLayers: whatever the layers, the result is one that can be written, and the same as that of a model which
// applies them one by one to a map.
func TestRandomLayers(t *testing.T) {
	names := []string{"a", "b", "d/x", "d/y", "d/e/z", "f"}
	rapid.Check(t, func(rt *rapid.T) {
		model := map[string]string{}
		var layers [][]byte
		for i := range rapid.IntRange(1, 4).Draw(rt, "layers") {
			var entries []any
			below := map[string]string{}
			for k, v := range model {
				below[k] = v
			}
			told := map[string]bool{}
			for range rapid.IntRange(0, 6).Draw(rt, "entries") {
				name := rapid.SampledFrom(names).Draw(rt, "name")
				if told[name] {
					continue
				}
				told[name] = true
				if i > 0 && rapid.Bool().Draw(rt, "gone") {
					d, base := path.Split(name)
					entries = append(entries, file{d + ".wh." + base, ""})
					delete(below, name)
					continue
				}
				content := fmt.Sprint(i, name)
				entries = append(entries, file{name, content})
				below[name] = content
			}
			model = below
			layers = append(layers, pack(t, entries...))
		}
		got, err := flatten(context.Background(), Options{Whiteouts: true}, layers...)
		if err != nil {
			rt.Fatal(err)
		}
		var want []string
		for name, content := range model {
			want = append(want, name+" "+content)
		}
		slices.Sort(want)
		files := slices.DeleteFunc(strings.Split(got, "\n"), func(l string) bool { return strings.HasSuffix(l, "/") || l == "" })
		if !slices.Equal(files, want) {
			rt.Fatalf("got %q, want %q", files, want)
		}
	})
}

// FuzzMerge: no archive makes it panic, or give what cannot be written.
func FuzzMerge(f *testing.F) {
	f.Add(pack(f, dir("etc/"), file{"etc/a", "1"}, link("b", "etc/a"), sym("c", "etc")))
	f.Add(pack(f, file{"etc/.wh.a", ""}, file{".wh..wh..opq", ""}))
	f.Fuzz(func(t *testing.T, archive []byte) {
		_, err := flatten(t.Context(), Options{Whiteouts: true, MaxBytes: 1 << 20, MaxEntries: 1000}, archive, archive)
		if err != nil && fault.KindOf(err) == fault.Unexpected {
			t.Errorf("error %v", err)
		}
	})
}
