package supply

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"

	"banger/internal/bundle"
	"banger/internal/fault"
)

func sumOf(b []byte) string {
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:])
}

// targz packs files given as name, content, name, content.
func targz(t *testing.T, files ...string) []byte {
	t.Helper()
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	w := tar.NewWriter(z)
	for i := 0; i < len(files); i += 2 {
		err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: files[i], Mode: 0o755, Size: int64(len(files[i+1]))})
		if err == nil {
			_, err = w.Write([]byte(files[i+1]))
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := errors.Join(w.Close(), z.Close()); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func put(t *testing.T, path string, content []byte) string {
	t.Helper()
	err := os.MkdirAll(filepath.Dir(path), 0o755)
	if err == nil {
		err = os.WriteFile(path, content, 0o755)
	}
	if err != nil {
		t.Fatal(err)
	}
	return path
}

func newStore(t *testing.T) *Store {
	t.Helper()
	dir := t.TempDir()
	return &Store{Dir: filepath.Join(dir, "runtime"), Downloads: filepath.Join(dir, "downloads")}
}

// listing lists the files of a tree; of the names of parts, only what they are.
func listing(t *testing.T, dir string) []string {
	t.Helper()
	var names []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && !d.IsDir() && d.Name() != lockName {
			rel, _ := filepath.Rel(dir, path)
			first, rest, inPart := strings.Cut(rel, "/")
			if inPart && partPattern.MatchString(first) {
				part, _, _ := strings.Cut(first, "-")
				rel = part + "/" + rest
			}
			names = append(names, rel)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return names
}

func program(name, version string) string {
	return fmt.Sprintf("#!/bin/sh\n[ \"$1\" = --version ] && echo '%s v%s' && echo && echo 'a line of the log'\n", name, version)
}

// releaseFiles are the files of a release as upstream packs it, with programs that only tell their version.
func releaseFiles(version string) []string {
	machine := machines[runtime.GOARCH]
	dir := fmt.Sprintf("release-v%s-%s/", version, machine)
	long := func(program string) string { return fmt.Sprintf("%s-v%s-%s", program, version, machine) }
	fc, jailer := program("Firecracker", version), program("Jailer", version)
	sums := fmt.Sprintf("%s  ./%s\n%s  ./%s\n", sumOf([]byte(fc)), long("firecracker"), sumOf([]byte(jailer)), long("jailer"))
	return []string{
		dir + "LICENSE", "free", dir + long("firecracker"), fc, dir + long("firecracker") + ".debug", "symbols", dir + long("jailer"), jailer,
		dir + "SHA256SUMS", sums,
	}
}

func archiveName(version string) string {
	return fmt.Sprintf("firecracker-v%s-%s.tgz", version, machines[runtime.GOARCH])
}

// releases serves releases as their place does.
func releases(t *testing.T, versions ...string) (base string) {
	t.Helper()
	mux := http.NewServeMux()
	for _, v := range versions {
		content := targz(t, releaseFiles(v)...)
		at := "/dl/v" + v + "/" + archiveName(v)
		mux.HandleFunc(at, func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(content) })
		mux.HandleFunc(at+".sha256.txt", func(w http.ResponseWriter, _ *http.Request) {
			_, _ = fmt.Fprintf(w, "%s  %s\n", sumOf(content), archiveName(v))
		})
	}
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	return server.URL + "/dl"
}

func TestInstallFirecracker(t *testing.T) {
	s := newStore(t)
	base := releases(t, FirecrackerVersion, "1.15.0")
	b, version, err := s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: base})
	if err != nil || version != FirecrackerVersion {
		t.Fatalf("%q, %v", version, err)
	}
	want := []string{"bundle.json", "firecracker/firecracker", "firecracker/jailer"}
	if got := listing(t, s.Dir); !slices.Equal(got, want) {
		t.Errorf("there is %q", got)
	}
	if problems, err := Verify(t.Context(), b); err != nil || len(problems) > 0 {
		t.Errorf("%q, %v", problems, err)
	}
	for _, name := range []string{"firecracker", "jailer"} {
		if info, err := os.Stat(b.Path(b.Manifest.VMMs[name])); err != nil || info.Mode() != 0o755 {
			t.Errorf("%s: %v, %v", name, info, err)
		}
	}
	// Another version takes its place, and the old one goes.
	b, version, err = s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: base, Version: "v1.15.0"})
	if err != nil || version != "1.15.0" {
		t.Fatalf("%q, %v", version, err)
	}
	if got := listing(t, s.Dir); !slices.Equal(got, want) {
		t.Errorf("there is %q", got)
	}
	if len(b.Manifest.Sources) != 1 || b.Manifest.Sources[0].Version != "1.15.0" || len(b.Manifest.Files) != 2 {
		t.Errorf("%+v", b.Manifest)
	}
	if left, _ := filepath.Glob(filepath.Join(s.Downloads, "*[0-9a-f]")); len(left) > 0 {
		t.Errorf("downloads stay: %q", left)
	}
}

func TestInstallFirecrackerFromFile(t *testing.T) {
	s := newStore(t)
	content := targz(t, releaseFiles("1.14.2")...)
	from := put(t, filepath.Join(t.TempDir(), archiveName("1.14.2")), content)
	_, _, err := s.InstallFirecracker(t.Context(), FirecrackerOptions{From: from})
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(fault.HintOf(err), "--sha256") {
		t.Errorf("without a checksum: %v (%s)", err, fault.HintOf(err))
	}
	for path, want := range map[string]fault.Kind{from + ".none": fault.NotFound, "/dev/zero": fault.Usage, t.TempDir(): fault.Usage} {
		for _, sum := range []string{"", sumOf(nil)} {
			if _, _, err := s.InstallFirecracker(t.Context(), FirecrackerOptions{From: path, SHA256: sum}); fault.KindOf(err) != want {
				t.Errorf("%s: %v", path, err)
			}
		}
	}
	if _, err := ReadListing("/dev/zero"); fault.KindOf(err) != fault.Usage {
		t.Errorf("an endless manifest: %v", err)
	}
	put(t, from+".sha256.txt", []byte(sumOf(content)+"  "+filepath.Base(from)+"\n"))
	for what, o := range map[string]FirecrackerOptions{"its checksum beside": {From: from}, "given": {From: from, SHA256: sumOf(content), Version: "1.14.2"}} {
		if _, version, err := s.InstallFirecracker(t.Context(), o); err != nil || version != "1.14.2" {
			t.Errorf("%s: %q, %v", what, version, err)
		}
	}
	if _, err := os.Stat(from); err != nil {
		t.Errorf("the user's archive is gone: %v", err)
	}
}

func TestBadReleases(t *testing.T) {
	machine := machines[runtime.GOARCH]
	replaced := func(old, new string) []string {
		files := releaseFiles("1.16.1")
		for i := range files {
			files[i] = strings.ReplaceAll(files[i], old, new)
		}
		return files
	}
	good := targz(t, releaseFiles("1.16.1")...)
	flipped := bytes.Clone(good)
	flipped[len(flipped)/2] ^= 1
	tampered := releaseFiles("1.16.1")
	tampered[3] += "# more\n"
	cases := map[string]struct {
		content []byte
		o       FirecrackerOptions
		kind    fault.Kind
		text    string
	}{
		"truncated, its checksum right":      {good[:len(good)/2], FirecrackerOptions{}, fault.Precondition, "ends too early"},
		"flipped":                            {flipped, FirecrackerOptions{SHA256: sumOf(good)}, fault.Precondition, "not what was expected"},
		"no archive":                         {[]byte(strings.Repeat("<html>please log in</html>", 100)), FirecrackerOptions{}, fault.Precondition, "damaged"},
		"another archive":                    {targz(t, "README", "hello"), FirecrackerOptions{}, fault.Precondition, "no archive of a Firecracker release"},
		"another machine":                    {targz(t, replaced(machine, "riscv64")...), FirecrackerOptions{}, fault.Precondition, "is for riscv64"},
		"another version than asked":         {good, FirecrackerOptions{Version: "1.15.0"}, fault.Precondition, "not 1.15.0"},
		"another version than its name says": {targz(t, replaced("Firecracker v1.16.1", "Firecracker v1.16.0")...), FirecrackerOptions{}, fault.Precondition, "checksum is"},
		"a program was changed":              {targz(t, tampered...), FirecrackerOptions{}, fault.Precondition, "checksum is"},
		"does not run":                       {targz(t, replaced("#!/bin/sh", "\x7fELF")[:8]...), FirecrackerOptions{}, fault.Precondition, "does not run here"},
		"lies about its version":             {targz(t, replaced("Firecracker v1.16.1", "Firecracker v1.16.0")[:8]...), FirecrackerOptions{}, fault.Precondition, "says that it is"},
		"no jailer":                          {targz(t, releaseFiles("1.16.1")[:6]...), FirecrackerOptions{}, fault.Precondition, "holds no jailer"},
		"bad checksum":                       {good, FirecrackerOptions{SHA256: "abc"}, fault.Usage, "no SHA-256"},
		"bad version":                        {good, FirecrackerOptions{Version: "../1"}, fault.Usage, "no version"},
	}
	for what, c := range cases {
		t.Run(what, func(t *testing.T) {
			s := newStore(t)
			before, _, err := s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: releases(t, "1.14.0"), Version: "1.14.0"})
			if err != nil {
				t.Fatal(err)
			}
			c.o.From = put(t, filepath.Join(t.TempDir(), archiveName("1.16.1")), c.content)
			put(t, c.o.From+".sha256.txt", []byte(sumOf(c.content)+"  x\n"))
			_, _, err = s.InstallFirecracker(t.Context(), c.o)
			if fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v", err)
			}
			after, err := bundle.Read(s.Dir)
			if err != nil || after.Manifest.VMMs["firecracker"] != before.Manifest.VMMs["firecracker"] || len(listing(t, s.Dir)) != 3 {
				t.Errorf("not as before: %v, %q", err, listing(t, s.Dir))
			}
		})
	}
}

func TestReleasesThatCannotBeTrusted(t *testing.T) {
	s := newStore(t)
	_, _, err := s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: "http://mirror.example/dl"})
	if fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), "proves nothing") {
		t.Errorf("%v", err)
	}
	if _, _, err = s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: releases(t, "1.14.0"), Version: "9.9.9"}); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a version that is not there: %v", err)
	}
	if _, err := os.Stat(s.Dir); err == nil {
		t.Error("the runtime directory was made for nothing")
	}
	here := strings.Replace(releases(t, "1.14.0"), "127.0.0.1", "localhost", 1)
	if _, _, err = s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: here, Version: "1.14.0"}); err != nil {
		t.Errorf("from this machine: %v", err)
	}
}

func TestPickSum(t *testing.T) {
	sum, other := strings.Repeat("a", 64), strings.Repeat("b", 64)
	cases := map[string]string{
		sum + "  f.tgz\n": sum, sum + " *f.tgz": sum, sum + "  ./renamed.tgz": sum, other + "  g\n" + sum + "  dir/f.tgz\n": sum,
		sum: sum, other + "  g\n" + sum + "  h\n": "", "": "", "<html>": "", strings.ToUpper(sum) + "  f.tgz": "",
	}
	for text, want := range cases {
		got, err := pickSum(text, "there", "f.tgz")
		if got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", text, got, err)
		}
	}
}

// packed makes a bundle of a kernel, an image and a VMM, and returns what lists it.
func packed(t *testing.T, s *Store) (Packed, Listed) {
	t.Helper()
	dir := t.TempDir()
	for _, name := range []string{"k/kernel.json", "k/vmlinuz", "k/vmlinux", "k/modules.ext4", "k/boot-modules.cpio", "i/image.json", "i/root.ext4"} {
		put(t, filepath.Join(dir, name), []byte(name))
	}
	p, err := s.Pack(t.Context(), PackOptions{
		Archive: filepath.Join(dir, "dist/b.tar.zst"), Kernel: filepath.Join(dir, "k"), Image: filepath.Join(dir, "i"), Version: "1.2.3",
		VMMs: map[string]string{"firecracker": put(t, filepath.Join(dir, "fc"), []byte("#!/bin/sh\n"))},
	})
	if err != nil {
		t.Fatal(err)
	}
	from, err := Choose("/nowhere/"+bundle.SourceFile, p.Listing)
	if err != nil {
		t.Fatal(err)
	}
	return p, from
}

func TestPackAndFetch(t *testing.T) {
	s := newStore(t)
	p, from := packed(t, s)
	if from.URL != p.Archive || from.SHA256 != p.SHA256 || from.Version != "1.2.3" {
		t.Errorf("listed %+v", from)
	}
	put(t, filepath.Join(s.Dir, "firecracker-of-mine-1", "notes"), []byte("mine"))
	put(t, filepath.Join(s.Dir, "banger-agent"), []byte("agent"))
	b, again, err := s.Fetch(t.Context(), from)
	if err != nil || again {
		t.Fatalf("%t, %v", again, err)
	}
	names := []string{}
	for _, part := range b.Parts() {
		names = append(names, part.Name)
		if _, err := os.Stat(part.Path); err != nil {
			t.Error(err)
		}
	}
	if got := strings.Join(names, " "); got != "kernel initramfs modules image firecracker banger-agent" {
		t.Errorf("parts: %s", got)
	}
	if content, err := os.ReadFile(b.Path(b.Manifest.Kernel)); err != nil || string(content) != "k/vmlinuz" {
		t.Errorf("%q, %v", content, err)
	}
	if b.Manifest.Version != "1.2.3" || b.Manifest.Architecture != runtime.GOARCH {
		t.Errorf("%+v", b.Manifest)
	}
	if _, again, err := s.Fetch(t.Context(), from); err != nil || !again {
		t.Errorf("again: %t, %v", again, err)
	}
	// What is damaged is fetched anew, and what is not ours stays.
	put(t, b.Path(b.Manifest.Image), []byte("i/root.exT4"))
	problems, err := Verify(t.Context(), b)
	if err != nil || len(problems) != 1 || !strings.Contains(problems[0].Text, "root.ext4 was changed") {
		t.Errorf("%q, %v", problems, err)
	}
	b, again, err = s.Fetch(t.Context(), from)
	if err != nil || again {
		t.Errorf("%t, %v", again, err)
	}
	if problems, err := Verify(t.Context(), b); err != nil || len(problems) > 0 {
		t.Errorf("%q, %v", problems, err)
	}
	tree := listing(t, s.Dir)
	if !slices.Contains(tree, "firecracker-of-mine-1/notes") || len(tree) != 12 {
		t.Errorf("there is %q", tree)
	}
	// A release of Firecracker takes the bundle's place, the rest of which stays in use.
	b, _, err = s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: releases(t, FirecrackerVersion)})
	if err != nil || b.Manifest.Kernel == "" || !strings.HasPrefix(b.Manifest.VMMs["firecracker"], "firecracker-") || len(b.Manifest.Sources) != 2 {
		t.Errorf("%+v, %v", b.Manifest, err)
	}
	if problems, err := Verify(t.Context(), b); err != nil || len(problems) > 0 {
		t.Errorf("%q, %v", problems, err)
	}
}

func TestFetchOverHTTP(t *testing.T) {
	s := newStore(t)
	p, from := packed(t, s)
	web := httptest.NewServer(http.FileServer(http.Dir(filepath.Dir(p.Archive))))
	defer web.Close()
	from.URL = web.URL + "/" + filepath.Base(p.Archive)
	if b, _, err := s.Fetch(t.Context(), from); err != nil || b.Manifest.Image == "" {
		t.Errorf("%+v, %v", b, err)
	}
}

func TestBadBundles(t *testing.T) {
	other := "arm64"
	if runtime.GOARCH == other {
		other = "amd64"
	}
	cases := map[string]struct {
		files []string
		text  string
	}{
		"nothing in it":      {[]string{"README", "x"}, "no bundle.json"},
		"no JSON":            {[]string{"bundle.json", "{"}, "no valid JSON"},
		"newer":              {[]string{"bundle.json", `{"schema": 2}`}, "schema 2"},
		"another machine":    {[]string{"bundle.json", fmt.Sprintf(`{"schema": 1, "architecture": %q}`, other)}, "is for " + other},
		"names what is out":  {[]string{"bundle.json", `{"schema": 1, "kernel": "../../../etc/passwd"}`}, "not inside"},
		"absolute":           {[]string{"bundle.json", `{"schema": 1, "vmms": {"firecracker": "/bin/sh"}}`}, "not inside"},
		"names what is gone": {[]string{"bundle.json", `{"schema": 1, "kernel": "vmlinuz"}`}, "vmlinuz (the kernel) is missing"},
		"wrong file": {[]string{
			"bundle.json", fmt.Sprintf(`{"schema": 1, "kernel": "k", "files": [{"path": "k", "size": 1, "sha256": %q}]}`, sumOf([]byte("y"))),
			"k", "x",
		}, "k was changed"},
		"a way out": {[]string{"bundle.json", `{"schema": 1}`, "../x", "x"}, "leads out"},
	}
	for what, c := range cases {
		t.Run(what, func(t *testing.T) {
			s := newStore(t)
			content := targz(t, c.files...)
			from := Listed{URL: put(t, filepath.Join(t.TempDir(), "b"), content), SHA256: sumOf(content)}
			_, _, err := s.Fetch(t.Context(), from)
			if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), c.text) {
				t.Errorf("%v", err)
			}
			if got := listing(t, s.Dir); len(got) > 0 {
				t.Errorf("left behind: %q", got)
			}
		})
	}
}

// A directory without bundle.json keeps its meaning when the first part is added to it.
func TestBareDirectoryGrows(t *testing.T) {
	s := newStore(t)
	put(t, filepath.Join(s.Dir, "vmlinuz"), []byte("kernel"))
	put(t, filepath.Join(s.Dir, "firecracker"), []byte("old"))
	b, _, err := s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: releases(t, FirecrackerVersion)})
	if err != nil || b.Manifest.Kernel != "vmlinuz" || b.Manifest.VMMs["firecracker"] == "firecracker" || b.Bare {
		t.Errorf("%+v, %v", b, err)
	}
}

func TestUnreadableManifestIsPutAside(t *testing.T) {
	s := newStore(t)
	put(t, filepath.Join(s.Dir, bundle.ManifestName), []byte("{"))
	if _, _, err := s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: releases(t, FirecrackerVersion)}); err != nil {
		t.Error(err)
	}
	if content, err := os.ReadFile(filepath.Join(s.Dir, bundle.ManifestName+".bad")); err != nil || string(content) != "{" {
		t.Errorf("%q, %v", content, err)
	}
}

// Killed at any moment, a change leaves the old state: what a killed one left is removed by the next.
func TestLeftoversAndTwoAtOnce(t *testing.T) {
	s := newStore(t)
	put(t, filepath.Join(s.Dir, temporaryPrefix+"123", "firecracker"), []byte("half"))
	_, err := s.change(func(string) (change, error) {
		_, err := s.change(func(string) (change, error) { return change{}, nil })
		if fault.KindOf(err) != fault.Conflict {
			t.Errorf("a second one: %v", err)
		}
		return change{}, context.Canceled
	})
	if fault.KindOf(err) != fault.Interrupted {
		t.Errorf("%v", err)
	}
	if got := listing(t, s.Dir); len(got) > 0 {
		t.Errorf("left behind: %q", got)
	}
}

// Wherever a change is killed, the next one removes what is in use neither by the old bundle.json nor by the new one.
func TestPartsOfAKilledChange(t *testing.T) {
	base := releases(t, FirecrackerVersion)
	for moment, stale := range map[string]string{
		"before bundle.json was written": "firecracker-9.9.9-123",
		"after it was":                   "firecracker-1.0.0-456",
	} {
		s := newStore(t)
		b, _, err := s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: base})
		if err != nil {
			t.Fatal(err)
		}
		used, _, _ := strings.Cut(b.Manifest.VMMs["firecracker"], "/")
		mine := put(t, filepath.Join(s.Dir, "firecracker-1.2.3-4", "firecracker"), nil) // nobody said that it is banger's
		put(t, filepath.Join(s.Dir, stale, "firecracker"), nil)
		put(t, filepath.Join(s.Dir, intentName), []byte(used+"\n"+stale))
		put(t, filepath.Join(s.Dir, "."+bundle.ManifestName+"789"), nil)
		if _, err := s.change(func(string) (change, error) { return change{}, context.Canceled }); fault.KindOf(err) != fault.Interrupted {
			t.Errorf("%s: %v", moment, err)
		}
		for path, want := range map[string]bool{mine: true, filepath.Join(s.Dir, used): true, filepath.Join(s.Dir, stale): false, filepath.Join(s.Dir, intentName): false} {
			if _, err := os.Stat(path); (err == nil) != want {
				t.Errorf("%s: %s: %v", moment, path, err)
			}
		}
		if left, err := filepath.Glob(filepath.Join(s.Dir, ".bundle.json*")); err != nil || len(left) > 0 {
			t.Errorf("left behind: %q, %v", left, err)
		}
	}
}

// What is wrong is told with the command that mends it.
func TestEachDamageIsMended(t *testing.T) {
	s := newStore(t)
	dir := t.TempDir()
	kernel := put(t, filepath.Join(dir, "kernel", "vmlinuz"), []byte("a kernel"))
	p, err := s.Pack(t.Context(), PackOptions{Archive: filepath.Join(dir, "b.tar.zst"), Kernel: filepath.Dir(kernel), Version: "1"})
	if err != nil {
		t.Fatal(err)
	}
	from, err := Choose(p.Listing)
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := s.Fetch(t.Context(), from); err != nil {
		t.Fatal(err)
	}
	b, _, err := s.InstallFirecracker(t.Context(), FirecrackerOptions{BaseURL: releases(t, FirecrackerVersion)})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range b.Manifest.Files {
		path := b.Path(f.Path)
		content, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		flipped := bytes.Clone(content)
		flipped[len(content)/2] ^= 1
		want := []string{"runtime", "fetch", "--manifest", p.Listing}
		if strings.HasPrefix(f.Path, "firecracker-") {
			want = []string{"runtime", "install", "firecracker", "--version", FirecrackerVersion}
		}
		put(t, path, flipped)
		problems, err := Verify(t.Context(), b)
		if err != nil || len(problems) != 1 || !strings.HasPrefix(problems[0].Text, path+" was changed") || !slices.Equal(problems[0].Mend, want) {
			t.Errorf("%s: %+v, %v", f.Path, problems, err)
		}
		put(t, path, content)
	}
	if problems, err := Verify(t.Context(), b); err != nil || len(problems) > 0 {
		t.Errorf("as it was: %+v, %v", problems, err)
	}
}

// A directory that cannot be changed is told before anything is fetched.
func TestUnwritableDirectoryIsToldFirst(t *testing.T) {
	asked := false
	server := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { asked = true }))
	defer server.Close()
	s := newStore(t)
	s.Dir = put(t, filepath.Join(t.TempDir(), "a file"), nil) + "/runtime"
	_, _, err := s.Fetch(t.Context(), Listed{Architecture: runtime.GOARCH, URL: server.URL + "/x", SHA256: strings.Repeat("a", 64)})
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "cannot change the runtime directory") || asked {
		t.Errorf("asked: %t, %v", asked, err)
	}
}

func TestListings(t *testing.T) {
	sum := strings.Repeat("a", 64)
	entry := func(arch, url string) string {
		return fmt.Sprintf("[[bundle]]\narchitecture = %q\nurl = %q\nsha256 = %q\n", arch, url, sum)
	}
	dir := t.TempDir()
	cases := map[string]struct {
		text string
		kind fault.Kind
		want string // URL, or text of the error
	}{
		"empty":         {"# nothing\n", fault.NotFound, "no bundle for " + runtime.GOARCH},
		"other machine": {entry("riscv64", "x"), fault.NotFound, "no bundle for " + runtime.GOARCH},
		"web":           {entry("riscv64", "x") + entry(runtime.GOARCH, "https://h/x"), 0, "https://h/x"},
		"relative":      {entry(runtime.GOARCH, "sub/x.tar"), 0, dir + "/sub/x.tar"},
		"absolute":      {entry(runtime.GOARCH, "/srv/x.tar"), 0, "/srv/x.tar"},
		"file URL":      {entry(runtime.GOARCH, "file:///srv/x.tar"), 0, "/srv/x.tar"},
		"file, no path": {entry(runtime.GOARCH, "file:x.tar"), fault.Usage, "no address"},
		"too large":     {strings.Repeat("#", maxListing+1), fault.Precondition, "larger than"},
		"other URL":     {entry(runtime.GOARCH, "s3://b/x.tar"), fault.Usage, "no address"},
		"unknown key":   {"[[bundle]]\nuri = 'x'\n", fault.Usage, ":2: unknown key"},
		"no TOML":       {"[[bundle", fault.Usage, ":1:"},
		"no sum":        {"[[bundle]]\narchitecture = 'amd64'\nurl = 'x'\n", fault.Usage, "no SHA-256"},
		"no url":        {"[[bundle]]\narchitecture = 'amd64'\n", fault.Usage, "without architecture or url"},
	}
	for what, c := range cases {
		path := put(t, filepath.Join(dir, bundle.SourceFile), []byte(c.text))
		got, err := Choose(path)
		switch {
		case c.kind == 0 && (err != nil || got.URL != c.want):
			t.Errorf("%s: %+v, %v", what, got, err)
		case c.kind != 0 && (fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.want) || fault.HintOf(err) == ""):
			t.Errorf("%s: %v (%s)", what, err, fault.HintOf(err))
		}
	}
	if _, err := Choose(filepath.Join(dir, "gone")); fault.KindOf(err) != fault.NotFound || fault.HintOf(err) != Local {
		t.Errorf("a manifest that was named and is not there: %v", err)
	}
}

func TestPackNothing(t *testing.T) {
	s := newStore(t)
	_, err := s.Pack(t.Context(), PackOptions{Archive: filepath.Join(t.TempDir(), "x")})
	if fault.KindOf(err) != fault.Precondition {
		t.Errorf("%v", err)
	}
	_, err = s.Pack(t.Context(), PackOptions{Archive: "/proc/x/y", VMMs: map[string]string{"firecracker": "/bin/sh"}})
	if fault.KindOf(err) != fault.Precondition {
		t.Errorf("%v", err)
	}
}

// The manifest that comes with banger lists nothing, and everything that speaks of bundles names the same two commands.
func TestOneStory(t *testing.T) {
	l, err := ReadListing("../../" + bundle.SourceFile)
	if err != nil || len(l.Bundles) != 0 {
		t.Errorf("%+v, %v", l, err)
	}
	for _, page := range []string{bundle.SourceFile, "docs/runtime.md"} {
		text, err := os.ReadFile("../../" + page)
		if err != nil {
			t.Fatal(err)
		}
		for _, command := range []string{"banger runtime package", "banger runtime fetch --manifest dist/" + bundle.SourceFile} {
			if !strings.Contains(string(text), command) || !strings.Contains(Local, command) {
				t.Errorf("%s does not tell of: %s", page, command)
			}
		}
	}
	makefile, err := os.ReadFile("../../Makefile")
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"runtime-bundle: build ## ", "\t@bin/banger runtime package\n", "runtime-fetch: build ## ", "\t@bin/banger runtime fetch --manifest dist/runtime-bundle.toml\n"} {
		if !strings.Contains(string(makefile), want) {
			t.Errorf("Makefile lacks %q", want)
		}
	}
}

// The example in the manifest is one that can be read.
func TestExample(t *testing.T) {
	text, err := os.ReadFile("../../" + bundle.SourceFile)
	if err != nil {
		t.Fatal(err)
	}
	_, example, found := strings.Cut(string(text), "# [[bundle]]")
	if !found {
		t.Fatal("no example")
	}
	example = "[[bundle]]" + strings.ReplaceAll(strings.ReplaceAll(example, "\n# ", "\n"), "64 hexadecimal digits", strings.Repeat("0", 64))
	l, err := ReadListing(put(t, filepath.Join(t.TempDir(), bundle.SourceFile), []byte(example)))
	if err != nil || len(l.Bundles) != 1 {
		t.Errorf("%+v, %v", l, err)
	}
}
