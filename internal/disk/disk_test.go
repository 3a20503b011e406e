package disk

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"

	"pgregory.net/rapid"

	"banger/internal/fault"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

func checkClean(t *testing.T, path string) {
	t.Helper()
	out, err := exec.Command(need.Binary(t, "e2fsck"), "-fn", path).CombinedOutput()
	if err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
}

func debugfs(t *testing.T, path, command string) string {
	t.Helper()
	out, err := exec.Command(need.Binary(t, "debugfs"), "-R", command, path).Output()
	if err != nil {
		t.Fatalf("debugfs %s: %v", command, err)
	}
	return string(out)
}

func noLeftovers(t *testing.T, dir string) {
	t.Helper()
	if left, _ := filepath.Glob(filepath.Join(dir, temporaryPrefix+"*")); len(left) > 0 {
		t.Errorf("left behind: %v", left)
	}
}

func TestCreateExt4IsCleanAndSmall(t *testing.T) {
	need.Binary(t, "mke2fs")
	path := filepath.Join(t.TempDir(), "d.ext4")
	if err := CreateExt4(t.Context(), path, 4<<30, "overlay"); err != nil {
		t.Fatal(err)
	}
	checkClean(t, path)
	if n, err := AllocatedBytes(path); err != nil || n > 3<<20 {
		t.Errorf("an empty disk of 4 GiB takes %d bytes (%v)", n, err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o600 || info.Size() != 4<<30 {
		t.Errorf("mode %v, size %d, error %v", info.Mode(), info.Size(), err)
	}
	noLeftovers(t, filepath.Dir(path))
}

func TestCreateExt4Refuses(t *testing.T) {
	path := filepath.Join(t.TempDir(), "d.ext4")
	if err := CreateExt4(t.Context(), path, 1<<20, "x"); fault.KindOf(err) != fault.Usage {
		t.Errorf("a disk of 1 MiB: %v", err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("a refused disk is there")
	}
}

func TestCloneSeed(t *testing.T) {
	need.Binary(t, "mke2fs")
	dir := t.TempDir()
	seeds := filepath.Join(dir, "seeds")
	var wait sync.WaitGroup
	for i := range 4 {
		wait.Go(func() {
			if err := CloneSeed(t.Context(), seeds, filepath.Join(dir, string(rune('a'+i))), 256<<20, "overlay"); err != nil {
				t.Error(err)
			}
		})
	}
	wait.Wait()
	checkClean(t, filepath.Join(dir, "a"))
	checkClean(t, filepath.Join(dir, "d"))
	if all, _ := os.ReadDir(seeds); len(all) != 1 {
		t.Errorf("%d entries among the seeds", len(all))
	}

	// A seed that a crash of the host cut short is not believed.
	seed, _ := filepath.Glob(filepath.Join(seeds, "*.ext4"))
	if err := os.Truncate(seed[0], 0); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(seed[0], 256<<20); err != nil {
		t.Fatal(err)
	}
	if err := CloneSeed(t.Context(), seeds, filepath.Join(dir, "e"), 256<<20, "overlay"); err != nil {
		t.Fatal(err)
	}
	checkClean(t, filepath.Join(dir, "e"))
}

// TestCopySparse compares contents and holes of sparse copies with their sources.
func TestCopySparse(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(rt *rapid.T) {
		src, dst := filepath.Join(dir, "src"), filepath.Join(dir, "dst")
		from, err := os.Create(src)
		if err != nil {
			rt.Fatal(err)
		}
		defer from.Close()
		size := rapid.Int64Range(0, 4<<20).Draw(rt, "size")
		for range rapid.IntRange(0, 5).Draw(rt, "extents") {
			data := rapid.SliceOfN(rapid.Byte(), 1, 100).Draw(rt, "data")
			if _, err := from.WriteAt(data, rapid.Int64Range(0, 4<<20).Draw(rt, "at")); err != nil {
				rt.Fatal(err)
			}
		}
		if err := from.Truncate(size); err != nil {
			rt.Fatal(err)
		}
		copySourceTo(rt, dst, from)
		want, _ := os.ReadFile(src)
		got, err := os.ReadFile(dst)
		if err != nil || !bytes.Equal(got, want) {
			rt.Fatalf("the copy differs (%v)", err)
		}
		a, _ := AllocatedBytes(src)
		if b, _ := AllocatedBytes(dst); b > a+64<<10 {
			rt.Fatalf("the copy takes %d bytes, the source %d", b, a)
		}
	})
}

func copySourceTo(t *rapid.T, dst string, from *os.File) {
	to, err := os.Create(dst)
	if err != nil {
		t.Fatal(err)
	}
	defer to.Close()
	if err := copySparse(context.Background(), to, from); err != nil {
		t.Fatal(err)
	}
}

func TestCloneFileLeavesNothingWhenInterrupted(t *testing.T) {
	dir := t.TempDir()
	src := filepath.Join(dir, "src")
	if err := os.WriteFile(src, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	err := CloneFile(ctx, filepath.Join(dir, "dst"), src)
	if err == nil {
		need.Missing(t, "host", "the file system shares blocks: there is nothing to interrupt")
	}
	if fault.KindOf(err) != fault.Interrupted {
		t.Errorf("error %v", err)
	}
	noLeftovers(t, dir)
	if err := CloneFile(t.Context(), filepath.Join(dir, "dst"), filepath.Join(dir, "none")); fault.KindOf(err) != fault.NotFound {
		t.Errorf("cloning what is not there: %v", err)
	}
}

// e2fsprogs takes what is behind a question mark for options, and others have meanings for commas and quotes.
func TestStrangeDirectory(t *testing.T) {
	need.Binary(t, "mke2fs")
	dir := filepath.Join(t.TempDir(), `-a b,c?d=e"f'g%h\é`)
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	t.Chdir(dir)
	if _, err := CreateExt4FromTar(t.Context(), filepath.Join(dir, "d.ext4"), MinExt4, "work", home(t)); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "e.ext4")
	if err := errors.Join(
		CloneSeed(t.Context(), filepath.Join(dir, "seeds"), path, MinExt4, "overlay"), GrowExt4(t.Context(), path, 2*MinExt4),
		checkExt4(t.Context(), path, nil),
	); err != nil {
		t.Fatal(err)
	}
	if size, _, err := readSuperblock(path); err != nil || size != 2*MinExt4 {
		t.Errorf("%d bytes, %v", size, err)
	}
	checkClean(t, "./e.ext4")
	noLeftovers(t, dir)
}

func TestFullDisk(t *testing.T) {
	small := hosttest.SmallDisk(t, 1<<20)
	src := filepath.Join(t.TempDir(), "src")
	if err := os.WriteFile(src, bytes.Repeat([]byte("x"), 3<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	full := map[string]error{
		"clone": CloneFile(t.Context(), filepath.Join(small, "dst"), src),
		"mke2fs": func() error {
			need.Binary(t, "mke2fs")
			return CreateExt4(t.Context(), filepath.Join(small, "d.ext4"), 4<<30, "x")
		}(),
	}
	for what, err := range full {
		if fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" || !strings.Contains(err.Error(), "disk full") {
			t.Errorf("%s on a full disk: %v", what, err)
		}
	}
	noLeftovers(t, small)
	if free, err := FreeBytes(small); err != nil || free < 900<<10 {
		t.Errorf("%d bytes free after the failures (%v)", free, err)
	}
}

func TestRequireFree(t *testing.T) {
	if err := RequireFree(t.TempDir(), 1, "a test"); err != nil {
		t.Error(err)
	}
	if err := RequireFree(t.TempDir(), 1<<60, "a test"); fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Errorf("an exabyte: %v", err)
	}
}

func TestGrowExt4(t *testing.T) {
	need.Binary(t, "resize2fs")
	path := filepath.Join(t.TempDir(), "d.ext4")
	if err := CreateExt4(t.Context(), path, 256<<20, "work"); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if err := GrowExt4(t.Context(), path, 512<<20); err != nil {
			t.Fatal(err)
		}
	}
	checkClean(t, path)
	if size, _, err := readSuperblock(path); err != nil || size != 512<<20 {
		t.Errorf("file system of %d bytes (%v)", size, err)
	}
	// A crash after the file became longer and before the file system did.
	if err := os.Truncate(path, 600<<20); err != nil {
		t.Fatal(err)
	}
	if err := GrowExt4(t.Context(), path, 600<<20); err != nil {
		t.Fatal(err)
	}
	checkClean(t, path)
	if err := GrowExt4(t.Context(), path, 256<<20); fault.KindOf(err) != fault.Usage {
		t.Errorf("shrinking: %v", err)
	}
}

// TestGrowUsedExt4 grows a disk as a guest that was killed leaves it: mounted before, journal not
// replayed.
func TestGrowUsedExt4(t *testing.T) {
	need.Binary(t, "resize2fs")
	path := filepath.Join(t.TempDir(), "d.ext4")
	if err := CreateExt4(t.Context(), path, 256<<20, "work"); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"set_super_value mnt_count 3", "set_super_value state 0"} {
		if out, err := exec.Command(need.Binary(t, "debugfs"), "-w", "-R", command, path).CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	if err := GrowExt4(t.Context(), path, 512<<20); err != nil {
		t.Fatal(err)
	}
	checkClean(t, path)
}

// tree is a tar stream with all kinds of entries an image has.
func tree(t *testing.T) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	put := func(h tar.Header, content string) {
		h.Size = int64(len(content))
		h.Format = tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(content)); err != nil {
			t.Fatal(err)
		}
	}
	put(tar.Header{Typeflag: tar.TypeDir, Name: "./", Mode: 0o755}, "")
	put(tar.Header{Typeflag: tar.TypeDir, Name: "./etc/", Mode: 0o755}, "")
	put(tar.Header{Typeflag: tar.TypeReg, Name: "./etc/hello", Mode: 0o644, Uid: 1000, Gid: 70000}, "hello\n")
	put(tar.Header{Typeflag: tar.TypeLink, Name: "./etc/link", Linkname: "./etc/hello"}, "")
	put(tar.Header{Typeflag: tar.TypeSymlink, Name: "./etc/sym", Linkname: "hello"}, "")
	put(tar.Header{Typeflag: tar.TypeReg, Name: "./etc/setuid", Mode: 0o4755}, "x")
	put(tar.Header{Typeflag: tar.TypeReg, Name: "./" + strings.Repeat("n", 255), Mode: 0o600}, "long")
	put(tar.Header{Typeflag: tar.TypeReg, Name: "./cap", Mode: 0o755, PAXRecords: map[string]string{
		"SCHILY.xattr.security.capability": "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
	}}, "c")
	put(tar.Header{Typeflag: tar.TypeDir, Name: "./dev/", Mode: 0o755}, "")
	put(tar.Header{Typeflag: tar.TypeChar, Name: "./dev/null", Mode: 0o666, Devmajor: 1, Devminor: 3}, "")
	put(tar.Header{Typeflag: tar.TypeFifo, Name: "./dev/fifo", Mode: 0o600}, "")
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return &b
}

func TestWriteExt4(t *testing.T) {
	path := filepath.Join(t.TempDir(), "root.ext4")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := WriteExt4(t.Context(), tree(t), f); err != nil {
		t.Fatal(err)
	}
	checkClean(t, path)
	if got := debugfs(t, path, "cat /etc/link"); got != "hello\n" {
		t.Errorf("content behind the hard link: %q", got)
	}
	if got := debugfs(t, path, "stat /etc/hello"); !strings.Contains(got, "User:  1000   Group: 70000") || !strings.Contains(got, "Links: 2") {
		t.Errorf("owner or link count: %s", got)
	}
	if got := debugfs(t, path, "stat /etc/setuid"); !strings.Contains(got, "Mode:  04755") {
		t.Errorf("mode: %s", got)
	}
	if got := debugfs(t, path, "ea_list /cap"); !strings.Contains(got, "security.capability (20)") {
		t.Errorf("extended attributes: %s", got)
	}
	if got := debugfs(t, path, "stat /dev/null"); !strings.Contains(got, "Device major/minor number: 01:03") {
		t.Errorf("device: %s", got)
	}
}

func TestWriteExt4OfManyFilesIsClean(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range 3000 { // more than one step of the inode table
		h := &tar.Header{Typeflag: tar.TypeReg, Name: "d/" + strings.Repeat("f", 1+i%200) + string(rune('a'+i%26)) + strings.Repeat("g", i/200), Mode: 0o644}
		if err := w.WriteHeader(h); err != nil {
			t.Fatal(err)
		}
	}
	_ = w.Close()
	f, err := os.Create(filepath.Join(t.TempDir(), "root.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := WriteExt4(t.Context(), &b, f); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f.Name())
}

// TestAttributesAreFound: the kernel finds attributes by their order. debugfs looks through all of them, so the order itself is read.
func TestAttributesAreFound(t *testing.T) {
	records := map[string]string{}
	for i := range 40 {
		space := []string{"user.", "trusted.", "security."}[i%3]
		records["SCHILY.xattr."+space+strings.Repeat(string(rune('z'-i%26)), 1+i*7%11)+string(rune('a'+i%26))] = "value"
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, name := range []string{"one", "two"} {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, PAXRecords: records}); err != nil {
			t.Fatal(err)
		}
	}
	_ = w.Close()
	f, err := os.Create(filepath.Join(t.TempDir(), "root.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := WriteExt4(t.Context(), &b, f); err != nil {
		t.Fatal(err)
	}
	checkClean(t, f.Name())
	if got := strings.Count(debugfs(t, f.Name(), "ea_list /two"), "= \"value\""); got != len(records) {
		t.Errorf("%d of %d attributes are there", got, len(records))
	}
	blocks := 0
	for at := int64(0); ; at += compactBlock {
		block := make([]byte, compactBlock)
		if n, _ := f.ReadAt(block, at); n < len(block) {
			break
		}
		if binary.LittleEndian.Uint32(block) != attributeMagic {
			continue
		}
		blocks++
		if entries, _ := entriesOf(block); len(entries) < 30 || !slices.IsSortedFunc(entries, byLookup) {
			t.Errorf("block %d: %d entries, or not in order", at/compactBlock, len(entries))
		}
	}
	if blocks != 2 {
		t.Errorf("%d attribute blocks", blocks)
	}
}

func TestWriteExt4OfBrokenTarFails(t *testing.T) {
	whole := tree(t).Bytes()
	f, err := os.Create(filepath.Join(t.TempDir(), "root.ext4"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := WriteExt4(t.Context(), bytes.NewReader(whole[:1300]), f); err == nil {
		t.Error("a tar stream cut short was taken for a whole one")
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := WriteExt4(ctx, bytes.NewReader(whole), f); fault.KindOf(err) != fault.Interrupted {
		t.Errorf("after the caller gave up: %v", err)
	}
}

// home is a small tree of the kinds of file that CreateExt4FromTar takes.
func home(t *testing.T) *bytes.Buffer {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range []tar.Header{
		{Typeflag: tar.TypeDir, Name: "./", Mode: 0o700},
		{Typeflag: tar.TypeReg, Name: "./.bashrc", Mode: 0o644, Uid: 7, Gid: 9, Size: 2},
		{Typeflag: tar.TypeDir, Name: "./.ssh/", Mode: 0o700},
		{Typeflag: tar.TypeSymlink, Name: "./with space", Linkname: ".bashrc", Mode: 0o777},
		{Typeflag: tar.TypeLink, Name: "./hard", Linkname: "./.bashrc"},
		{Typeflag: tar.TypeDir, Name: "./deep/er/", Mode: 0o3711, Uid: 100_000},
		{Typeflag: tar.TypeReg, Name: "./deep/say \"hi\"", Mode: 0o4755, Gid: 70_000, PAXRecords: map[string]string{
			"SCHILY.xattr.user.\"it\"":           "a value with\x00a zero byte",
			"SCHILY.xattr.user.big":              strings.Repeat("b", 3000),
			"SCHILY.xattr.user.none":             "",
			"SCHILY.xattr.user.too":              strings.Repeat("c", 3000),
			"SCHILY.xattr.security.capability":   "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00",
			"SCHILY.xattr.user.lines\nin a name": "x",
		}},
		{Typeflag: tar.TypeFifo, Name: "./deep/er/fi fo", Mode: 0o600},
		{Typeflag: tar.TypeChar, Name: "./null", Mode: 0o666, Devmajor: 1, Devminor: 3},
		{Typeflag: tar.TypeBlock, Name: "./disk", Mode: 0o660, Gid: 6, Devmajor: 259, Devminor: 300},
		{Typeflag: tar.TypeChar, Name: "./last", Mode: 0o600, Devmajor: 4095, Devminor: 1<<20 - 1},
		{Typeflag: tar.TypeReg, Name: "./two\nlines", Mode: 0o644, Size: 2},
		{Typeflag: tar.TypeLink, Name: "./lost", Linkname: "./two\nlines"},
	} {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		_, _ = w.Write([]byte("#\n")[:h.Size])
	}
	_ = w.Close()
	return &b
}

func TestCreateExt4FromTar(t *testing.T) {
	need.Binary(t, "mke2fs")
	path := filepath.Join(t.TempDir(), "seed.ext4")
	skipped, err := CreateExt4FromTar(t.Context(), path, 600<<20, "work", home(t)) // from 512 MiB on, mke2fs makes blocks of 4 KiB
	if err != nil {
		t.Fatal(err)
	}
	checkClean(t, path)
	if got := debugfs(t, path, "stat /"); !strings.Contains(got, "Mode:  0700") {
		t.Errorf("root: %s", got)
	}
	if got := debugfs(t, path, "stat /.bashrc"); !strings.Contains(got, "User:     7   Group:     9") {
		t.Errorf("owner: %s", got)
	}
	if got := debugfs(t, path, "stat \"/with space\""); !strings.Contains(got, "Fast link dest: \".bashrc\"") {
		t.Errorf("link: %s", got)
	}
	if got := debugfs(t, path, "stat /hard"); !strings.Contains(got, "Links: 2") || !strings.Contains(got, "User:     7") {
		t.Errorf("hard link: %s", got)
	}
	if got := debugfs(t, path, "stat /deep"); !strings.Contains(got, "Mode:  0755") || !strings.Contains(got, "User:     0   Group:     0") {
		t.Errorf("a directory that only a name implied: %s", got)
	}
	if got := debugfs(t, path, `stat "/deep/er"`); !strings.Contains(got, "Mode:  03711") || !strings.Contains(got, "User: 100000") {
		t.Errorf("directory: %s", got)
	}
	got := debugfs(t, path, `stat "/deep/say ""hi"""`)
	for _, want := range []string{"Mode:  04755", "Group: 70000", `user.\"it\" (24)`, "user.big (3000)", "user.none (0)", "security.capability (20)"} {
		if !strings.Contains(got, want) {
			t.Errorf("no %s in %s", want, got)
		}
	}
	if got := debugfs(t, path, `ea_get -x "/deep/say ""hi""" "user.""it"""`); !strings.Contains(got, "68 00 61") {
		t.Errorf("the attribute's value: %s", got)
	}
	for file, want := range map[string]string{
		`"/deep/er/fi fo"`: "Type: FIFO    Mode:  0600", "/null": "Device major/minor number: 01:03", "/disk": "Device major/minor number: 259:300",
		"/last": "Device major/minor number: 4095:1048575",
	} {
		if got := debugfs(t, path, "stat "+file); !strings.Contains(got, want) {
			t.Errorf("no %q in %s", want, got)
		}
	}
	if len(skipped) != 4 || !strings.Contains(strings.Join(skipped, " "), `"lost": a hard link`) {
		t.Errorf("left out %q", skipped)
	}
	noLeftovers(t, filepath.Dir(path))
}

// A tree of nothing but strange names is told of in some lines, not in a million.
func TestSkippedIsBounded(t *testing.T) {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i := range MaxLeftOut + 7 {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: fmt.Sprintf("two\nlines %d", i)}); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	need.Binary(t, "mke2fs")
	skipped, err := CreateExt4FromTar(t.Context(), filepath.Join(t.TempDir(), "seed.ext4"), MinExt4, "work", &b)
	if err != nil || len(skipped) != MaxLeftOut+1 || skipped[MaxLeftOut] != "and 7 more" {
		t.Errorf("%d lines: %q, %v", len(skipped), skipped, err)
	}
}

// What is made is a function of what it is made of: neither the time, nor the place, nor chance has a part in it.
func TestTheSameContentGivesTheSameBytes(t *testing.T) {
	need.Binary(t, "mke2fs")
	t.Setenv("TZ", "UTC")
	sums := map[[32]byte]bool{}
	for _, name := range []string{"one", "two"} {
		dir := filepath.Join(t.TempDir(), name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		filled, empty := filepath.Join(dir, "filled.ext4"), filepath.Join(dir, "empty.ext4")
		if _, err := CreateExt4FromTar(t.Context(), filled, 256<<20, "work", home(t)); err != nil {
			t.Fatal(err)
		}
		if err := CreateExt4(t.Context(), empty, 256<<20, "overlay"); err != nil {
			t.Fatal(err)
		}
		for _, path := range []string{filled, empty} {
			checkClean(t, path)
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			sums[sha256.Sum256(b)] = true
			// Two within one second would hide a clock.
			if got := debugfs(t, path, "stats -h"); strings.Count(got, "Fri Jan  1 00:00:00 2010") != 3 { // created, written, checked
				t.Errorf("times of %s: %s", path, got)
			}
		}
		for _, file := range []string{"/", "/.bashrc", "\"/with space\"", "/.ssh"} {
			if got := debugfs(t, filled, "stat "+file); strings.Count(got, "0x4b3d3b00:") != 0 || strings.Count(got, "time: 0x00000000:00000000 ") != 4 {
				t.Errorf("times of %s: %s", file, got)
			}
		}
	}
	if len(sums) != 2 {
		t.Errorf("%d different file systems of two contents", len(sums))
	}
}

// BenchmarkCloneSeed is what a new VM's overlay disk costs.
func BenchmarkCloneSeed(b *testing.B) {
	need.Binary(b, "mke2fs")
	dir := b.TempDir()
	for i := 0; b.Loop(); i++ {
		if err := CloneSeed(b.Context(), filepath.Join(dir, "seeds"), filepath.Join(dir, strconv.Itoa(i)), 4<<30, "overlay"); err != nil {
			b.Fatal(err)
		}
	}
}

func TestSpaceFault(t *testing.T) {
	if err := spaceFault(syscall.EIO, "/x"); !errors.Is(err, syscall.EIO) || fault.KindOf(err) != fault.Unexpected {
		t.Errorf("EIO became %v", err)
	}
	if spaceFault(nil, "/x") != nil {
		t.Error("no error became one")
	}
	// Where room is to be made is there also when what was made is gone.
	for path, want := range map[string]string{"/s/images/.new-7/root.ext4": "/s/images,", "/s/vms/7/overlay.ext4": "/s/vms/7,", "/.s/x": "/.s,"} {
		if hint := fault.HintOf(spaceFault(syscall.ENOSPC, path)); !strings.HasPrefix(hint, "free some space in "+want) {
			t.Errorf("%s: %s", path, hint)
		}
	}
}
