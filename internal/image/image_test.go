package image

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"banger/internal/debian"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/hosttest/need"
	"banger/internal/progress"
)

const status = `Package: bash
Status: install ok installed
Version: 5.2

Package: gone
Status: deinstall ok config-files
Version: 1

Package: apt
Status: install ok installed
Description: x
 Version: 9
Version: 3.0
`

// rootTar is a root file system as mmdebstrap writes it, padded as GNU tar does.
func rootTar(t *testing.T) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	dir := func(name string, mode int64) {
		t.Helper()
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: "./" + name, Mode: mode}); err != nil {
			t.Fatal(err)
		}
	}
	file := func(name, content string) {
		t.Helper()
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "./" + name, Mode: 0o644, Size: int64(len(content))}); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, content); err != nil {
			t.Fatal(err)
		}
	}
	for _, d := range []string{"", "etc/", "etc/ssh/", "usr/", "usr/share/doc/bash/", "var/lib/apt/lists/partial/", "var/log/apt/"} {
		dir(d, 0o755)
	}
	dir("root/", 0o700)
	dir("root/.ssh/", 0o700)
	file("root/.bashrc", "# bash\n")
	file("etc/passwd", "root:x:0:0::/root:/bin/sh\n")
	file("etc/machine-id", "0123456789abcdef0123456789abcdef\n")
	file("etc/ssh/ssh_host_ed25519_key", "secret")
	file("etc/apt/apt.conf.d/99mmdebstrap", "x")
	file("usr/share/doc/bash/copyright", "GPL")
	file("usr/share/doc/bash/changelog.gz", "x")
	file("usr/share/man/man1/bash.1.gz", "x")
	file("usr/share/locale/de/LC_MESSAGES/bash.mo", "x")
	file("usr/share/locale/locale.alias", "x")
	file("var/lib/apt/lists/deb.debian.org_x", "x")
	file("var/log/dpkg.log", "x")
	file("var/lib/dpkg/status", status)
	file("var/lib/dpkg/status-old", status)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeLink, Name: "./etc/passwd-link", Linkname: "./etc/passwd"}); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	b.Write(make([]byte, 200<<10))
	return b.Bytes()
}

func names(t *testing.T, stream io.Reader) map[string]string {
	t.Helper()
	found := map[string]string{}
	for r := tar.NewReader(stream); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return found
		}
		if err != nil {
			t.Fatal(err)
		}
		content, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if _, twice := found[clean(h.Name)]; twice {
			t.Errorf("%s is there twice", h.Name)
		}
		found[clean(h.Name)] = string(content)
	}
}

func TestFilterRoot(t *testing.T) {
	var out bytes.Buffer
	result, err := filterRoot(t.Context(), &out, bytes.NewReader(rootTar(t)))
	if err != nil {
		t.Fatal(err)
	}
	got := names(t, &out)
	for _, gone := range []string{
		"root/.bashrc", "etc/ssh/ssh_host_ed25519_key", "etc/apt/apt.conf.d/99mmdebstrap", "usr/share/doc/bash/changelog.gz",
		"usr/share/man/man1/bash.1.gz", "usr/share/locale/de/LC_MESSAGES/bash.mo", "var/lib/apt/lists/deb.debian.org_x",
		"var/log/dpkg.log", "var/lib/dpkg/status-old",
	} {
		if _, there := got[gone]; there {
			t.Errorf("%s is in the image", gone)
		}
	}
	for name, content := range map[string]string{
		"root": "", "etc/machine-id": "", "etc/resolv.conf": "", "usr/share/doc/bash/copyright": "GPL", "etc/passwd-link": "",
		"usr/share/locale/locale.alias": "x", "var/lib/dpkg/status": status, "usr/lib/modules": "", "var/log/apt": "",
		"var/lib/apt/lists/partial": "", "proc": "",
	} {
		if have, there := got[name]; !there || have != content {
			t.Errorf("%s: there %v, content %q", name, there, have)
		}
	}
	if !slices.Equal(result.packages, []string{"apt=3.0", "bash=5.2"}) {
		t.Errorf("packages %v", result.packages)
	}
	if home := names(t, &result.home); home[".bashrc"] != "# bash\n" || len(home) != 3 {
		t.Errorf("home %v", home)
	}
}

// TestPackagesOfAlpine: the list of apk, as it is in the image.
func TestPackagesOfAlpine(t *testing.T) {
	list := "C:Q1x=\nP:musl\nV:1.2.5-r9\nA:x86_64\nT:the musl c library (libc) implementation\nF:lib\nR:libc.musl\n\nC:Q1y=\nP:busybox\nV:1.37.0-r12\np:/bin/sh cmd:busybox=1\n\n"
	if got := installedByApk(list); !slices.Equal(got, []string{"busybox=1.37.0-r12", "musl=1.2.5-r9"}) {
		t.Errorf("packages %q", got)
	}
	var in, out bytes.Buffer
	w := tar.NewWriter(&in)
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: "lib/apk/db/installed", Mode: 0o644, Size: int64(len(list))}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte(list)); err != nil || w.Close() != nil {
		t.Fatal(err)
	}
	var result filtered
	f := newFilter(rules{dropped: func(string, bool) bool { return false }}, &out, io.Discard, &result)
	if err := f.run(t.Context(), &in); err != nil || len(result.packages) != 2 || !bytes.Contains(out.Bytes(), []byte(list)) {
		t.Errorf("packages %q, %v", result.packages, err)
	}
}

func TestFilterRootRefuses(t *testing.T) {
	var empty, link bytes.Buffer
	if err := tar.NewWriter(&empty).Close(); err != nil {
		t.Fatal(err)
	}
	w := tar.NewWriter(&link)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeDir, Name: "etc/"},
		{Typeflag: tar.TypeDir, Name: "usr/"},
		{Typeflag: tar.TypeLink, Name: "usr/x", Linkname: "usr/share/man/x"},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
	}
	_ = w.Close()
	for name, stream := range map[string][]byte{"empty": empty.Bytes(), "dangling hard link": link.Bytes(), "nonsense": bytes.Repeat([]byte("x"), 2000)} {
		if _, err := filterRoot(t.Context(), io.Discard, bytes.NewReader(stream)); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

// playMmdebstrap puts a program in the way that does what script says; $TAR is a root file system.
func playMmdebstrap(t *testing.T, script string) {
	t.Helper()
	for _, tool := range []string{"mke2fs", "debugfs", "apt-config"} {
		need.Binary(t, tool)
	}
	if _, err := debian.Keyring(); err != nil {
		need.Missing(t, "binary", err.Error())
	}
	dir := t.TempDir()
	path := filepath.Join(dir, "root.tar")
	if err := os.WriteFile(path, rootTar(t), 0o600); err != nil {
		t.Fatal(err)
	}
	program := "#!/bin/sh\nTAR=" + path + "\n" + script + "\n"
	if err := os.WriteFile(filepath.Join(dir, "mmdebstrap"), []byte(program), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	t.Setenv("TMPDIR", t.TempDir())
}

const goodScript = `echo "I: running apt-get update..." >&2; mkdir "$TMPDIR/work"; cat "$TAR"; echo "I: creating tarball..." >&2`

func TestBootstrap(t *testing.T) {
	playMmdebstrap(t, goodScript)
	s := Open(filepath.Join(t.TempDir(), "images"))
	var told []string
	sink := progress.Sink(func(e progress.Event) { told = append(told, string(e.Status)+" "+e.Message) })
	i, err := s.Bootstrap(t.Context(), BootstrapOptions{}, sink)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(i.Name, "debian-trixie-") || i.WorkSeedBytes != SeedBytes || len(i.Packages) != 2 || i.RootBytes == 0 {
		t.Errorf("image %+v", i)
	}
	for _, path := range []string{i.Root, i.WorkSeed} {
		if out, err := exec.Command(need.Binary(t, "e2fsck"), "-fn", path).CombinedOutput(); err != nil {
			t.Errorf("e2fsck: %v\n%s", err, out)
		}
	}
	if !slices.Contains(told, "update reading Debian's package lists") || told[len(told)-1] != "done " {
		t.Errorf("progress %q", told)
	}
	for _, name := range []string{"", "debian", "debian-trixie", i.Name} {
		if got, err := s.Get(t.Context(), name); err != nil || got.Name != i.Name {
			t.Errorf("Get(%q): %s, error %v", name, got.Name, err)
		}
	}
	if err := s.Verify(t.Context(), ""); err != nil {
		t.Error(err)
	}
	scratchGone(t)

	playMmdebstrap(t, "exit 1") // a second run does not even look
	if again, err := s.Bootstrap(t.Context(), BootstrapOptions{}, nil); err != nil || again.Name != i.Name {
		t.Errorf("second run: %s, error %v", again.Name, err)
	}
}

func scratchGone(t *testing.T) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(os.TempDir(), scratchPrefix+"*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestBootstrapFails(t *testing.T) {
	for name, script := range map[string]string{
		"at once":         `echo "E: no network" >&2; exit 1`,
		"in the middle":   `head -c 5000 "$TAR"; echo "E: no network" >&2; exit 1`,
		"after the end":   `cat "$TAR"; echo "E: no network" >&2; exit 1`,
		"no file systems": `head -c 20480 /dev/zero; echo "E: no network" >&2`,
	} {
		t.Run(name, func(t *testing.T) {
			playMmdebstrap(t, script)
			dir := filepath.Join(t.TempDir(), "images")
			_, err := Open(dir).Bootstrap(t.Context(), BootstrapOptions{}, nil)
			if fault.KindOf(err) != fault.Precondition {
				t.Errorf("error %v", err)
			}
			if name != "no file systems" && (!strings.Contains(err.Error(), "no network") || fault.HintOf(err) == "") {
				t.Errorf("error %v, hint %q", err, fault.HintOf(err))
			}
			nothingIn(t, dir)
			scratchGone(t)
		})
	}
}

func nothingIn(t *testing.T, dir string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != ".lock" {
			t.Errorf("left behind: %s", e.Name())
		}
	}
}

func TestBootstrapInterrupted(t *testing.T) {
	playMmdebstrap(t, `echo "I: extracting archives..." >&2; head -c 5000 "$TAR"; mkdir "$TMPDIR/work"; exec sleep 60`)
	ctx, cancel := context.WithCancel(t.Context())
	sink := progress.Sink(func(e progress.Event) {
		if e.Message == "unpacking the base system" {
			cancel()
		}
	})
	dir := filepath.Join(t.TempDir(), "images")
	begin := time.Now()
	_, err := Open(dir).Bootstrap(ctx, BootstrapOptions{}, sink)
	if fault.KindOf(err) != fault.Interrupted || time.Since(begin) > 20*time.Second {
		t.Errorf("after %s: %v", time.Since(begin), err)
	}
	nothingIn(t, dir)
	scratchGone(t)
}

// TestNextBuildRemovesWhatADeadOneLeft: a lock tells a dead build from one at work.
func TestNextBuildRemovesWhatADeadOneLeft(t *testing.T) {
	playMmdebstrap(t, goodScript)
	alive, err := newScratch(t.Context(), "mmdebstrap")
	if err != nil {
		t.Fatal(err)
	}
	dead := filepath.Join(os.TempDir(), scratchPrefix+"dead")
	if err := os.MkdirAll(filepath.Join(dead, "mmdebstrap.x", "usr"), 0o700); err != nil {
		t.Fatal(err)
	}
	dir := filepath.Join(t.TempDir(), "images")
	if err := os.MkdirAll(filepath.Join(dir, ".new-dead"), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(dir).Bootstrap(t.Context(), BootstrapOptions{}, nil); err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{dead, filepath.Join(dir, ".new-dead")} {
		if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there", path)
		}
	}
	if _, err := os.Stat(alive.dir); err != nil {
		t.Errorf("the directory of a build at work is gone: %v", err)
	}
	if err := alive.remove(t.Context()); err != nil {
		t.Error(err)
	}
}

func TestDamagedImage(t *testing.T) {
	playMmdebstrap(t, goodScript)
	s := Open(filepath.Join(t.TempDir(), "images"))
	i, err := s.Bootstrap(t.Context(), BootstrapOptions{}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(i.Root, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), ""); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), rootName) {
		t.Errorf("a root file cut short: %v", err)
	}
	if list, err := s.List(t.Context()); err != nil || len(list) != 1 || list[0].Problem == "" {
		t.Errorf("list %+v, error %v", list, err)
	}
	// The next setup sees it and makes a sound one.
	if again, err := s.Bootstrap(t.Context(), BootstrapOptions{}, nil); err != nil || again.Problem != "" {
		t.Errorf("image %+v, error %v", again, err)
	}
}

func TestGetUnknown(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "none"))
	for _, name := range []string{"", "x", "../x"} {
		if _, err := s.Get(t.Context(), name); fault.KindOf(err) != fault.NotFound || fault.HintOf(err) == "" {
			t.Errorf("Get(%q): %v", name, err)
		}
	}
}

func TestMountedBelow(t *testing.T) {
	if got, err := mountedBelow("/"); got != "" || err != nil { // "//" is the beginning of no mount point
		t.Errorf("below /: %q, error %v", got, err)
	}
	if got, err := mountedBelow(""); got == "" || err != nil {
		t.Errorf("nothing is mounted anywhere: error %v", err)
	}
}

// TestRealImage looks at an image that was bootstrapped.
func TestRealImage(t *testing.T) {
	s := Open(filepath.Join(need.VM(t), "images"))
	i, err := s.Get(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if i.RootBytes > 300<<20 {
		t.Errorf("the root file system has %d bytes", i.RootBytes)
	}
	hasSSH := slices.ContainsFunc(i.Packages, func(p string) bool { return strings.HasPrefix(p, "openssh-server=") })
	if !hasSSH || len(i.Packages) < 50 {
		t.Errorf("packages %v", i.Packages)
	}
	if out, err := exec.Command(need.Binary(t, "e2fsck"), "-fn", i.Root).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	out, err := exec.Command(need.Binary(t, "debugfs"), "-R", "ls -p /etc/ssh", i.Root).Output()
	if err != nil || strings.Contains(string(out), "ssh_host_") || !strings.Contains(string(out), "sshd_config") {
		t.Errorf("/etc/ssh: %v\n%s", err, out)
	}
}

func TestRootIsSeenAsAMount(t *testing.T) {
	for line, want := range map[string]bool{
		"22 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda rw\n":                              true,
		"1 1 0:2 / /proc rw - proc proc rw\n22 1 254:0 /srv/root / rw - ext4 /dev/vda rw\n":     true,
		"30 22 0:5 / /dev rw - devtmpfs udev rw\n31 22 0:20 / /proc rw,nosuid - proc proc rw\n": false,
	} {
		if got := rootMount.MatchString(line); got != want {
			t.Errorf("%q: %v", line, got)
		}
	}
}

// What a build or a bootstrap has no room for is told of, and not without end.
func TestFilterTellsOfAttributesWithoutRoom(t *testing.T) {
	var in bytes.Buffer
	w := tar.NewWriter(&in)
	big := map[string]string{"SCHILY.xattr.user.a": strings.Repeat("a", 4000), "SCHILY.xattr.user.b": strings.Repeat("b", 4000)}
	for i := range disk.MaxLeftOut + 5 {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("opt/%d", i), Mode: 0o644, PAXRecords: big}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var result filtered
	f := newFilter(rules{raw: true, dropped: func(string, bool) bool { return false }}, io.Discard, io.Discard, &result)
	if err := f.run(t.Context(), &in); err != nil {
		t.Fatal(err)
	}
	got := result.skipped.Lines()
	if len(got) != disk.MaxLeftOut+1 || got[0] != `"/opt/0": its attribute user.b has no room beside the others` || got[disk.MaxLeftOut] != "and 5 more" {
		t.Errorf("%d lines: %q", len(got), got[:min(2, len(got))])
	}
}
