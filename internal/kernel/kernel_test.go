package kernel

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/klauspost/compress/zstd"

	"banger/internal/artifact"
	"banger/internal/fault"
	"banger/internal/hosttest/need"
)

// smallELF is an ELF header with some content behind it.
func smallELF(t *testing.T) []byte {
	t.Helper()
	h := elf.Header64{Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64, Phentsize: 56, Shentsize: 64}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	var b bytes.Buffer
	if err := binary.Write(&b, binary.LittleEndian, h); err != nil {
		t.Fatal(err)
	}
	r := rand.New(rand.NewPCG(1, 2))
	for range 20_000 {
		fmt.Fprintf(&b, "%x ", r.Uint32()>>uint(r.IntN(32)))
	}
	return b.Bytes()
}

// bzImage puts a payload where the setup header says it is.
func bzImage(payload []byte) []byte {
	const setupSectors, offset = 3, 100
	image := make([]byte, (setupSectors+1)*512+offset)
	image[0x1f1] = setupSectors
	binary.LittleEndian.PutUint16(image[0x1fe:], 0xaa55)
	copy(image[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(image[0x206:], 0x20f)
	binary.LittleEndian.PutUint32(image[0x248:], offset)
	binary.LittleEndian.PutUint32(image[0x24c:], uint32(len(payload)))
	return append(append(image, payload...), "what follows"...)
}

// pipe packs content with a program.
func pipe(t *testing.T, content []byte, program string, args ...string) []byte {
	t.Helper()
	cmd := exec.Command(need.Binary(t, program), args...)
	cmd.Stdin = bytes.NewReader(content)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v", program, err)
	}
	return out
}

func withSize(packed []byte, size int) []byte {
	return binary.LittleEndian.AppendUint32(packed, uint32(size))
}

func TestExtractELF(t *testing.T) {
	want := smallELF(t)
	packers := map[string]func(t *testing.T) []byte{
		"gzip": func(t *testing.T) []byte {
			var b bytes.Buffer
			w := gzip.NewWriter(&b)
			if _, err := w.Write(want); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			return b.Bytes()
		},
		"zstd": func(t *testing.T) []byte {
			w, err := zstd.NewWriter(nil)
			if err != nil {
				t.Fatal(err)
			}
			return withSize(w.EncodeAll(want, nil), len(want))
		},
		"xz": func(t *testing.T) []byte { // with the filter that the kernel's build uses
			return withSize(pipe(t, want, "xz", "--check=crc32", "--x86", "--lzma2=dict=1MiB", "-c"), len(want))
		},
		"lz4":  func(t *testing.T) []byte { return withSize(pipe(t, want, "lz4", "-l", "-9", "-c"), len(want)) },
		"none": func(*testing.T) []byte { return want },
	}
	for name, pack := range packers {
		t.Run(name, func(t *testing.T) {
			got, err := extractELF(t.Context(), bzImage(pack(t)))
			if err != nil || !bytes.Equal(got, want) {
				t.Errorf("%d bytes instead of %d, error %v", len(got), len(want), err)
			}
		})
	}
}

func TestExtractELFRefuses(t *testing.T) {
	good := bzImage(smallELF(t))
	old := slices.Clone(good)
	binary.LittleEndian.PutUint16(old[0x206:], 0x204)
	outside := slices.Clone(good)
	binary.LittleEndian.PutUint32(outside[0x24c:], 1<<31)
	for name, image := range map[string][]byte{
		"empty": nil, "text": bytes.Repeat([]byte("x"), 4096), "old protocol": old, "payload outside": outside,
		"unknown packing": bzImage([]byte("no known magic")), "no ELF": bzImage(gzipped(t, "hello")),
		"cut short":  bzImage(gzipped(t, strings.Repeat("hello", 100))[:20]),
		"wrong size": bzImage(withSize(pipe(t, smallELF(t), "lz4", "-l", "-c"), 12345)),
	} {
		if _, err := extractELF(t.Context(), image); fault.KindOf(err) != fault.Precondition {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func gzipped(t *testing.T, s string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := gzip.NewWriter(&b)
	if _, err := io.WriteString(w, s); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func FuzzUnpackLZ4(f *testing.F) {
	f.Add([]byte("\x02\x21\x4c\x18\x06\x00\x00\x00\x50hello"))
	f.Add([]byte("\x02\x21\x4c\x18\x08\x00\x00\x00\x1fa\x01\x00\xff\xff\x00\x00"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) < 4 {
			return
		}
		out, err := unpackLZ4(b)
		if err == nil && len(out) > 256*len(b) {
			t.Errorf("%d bytes became %d", len(b), len(out))
		}
	})
}

func FuzzPayload(f *testing.F) {
	f.Add(bzImage([]byte("payload")))
	f.Fuzz(func(t *testing.T, b []byte) {
		if p, err := payloadOf(b); err == nil && len(p) == 0 {
			t.Error("an empty payload")
		}
	})
}

func TestModuleClosure(t *testing.T) {
	deps, err := parseDependencies(strings.NewReader(
		"kernel/net/a-b.ko.xz: kernel/net/direct.ko.xz kernel/net/deepest.ko.xz\nkernel/net/direct.ko.xz: kernel/net/deepest.ko.xz\nkernel/net/deepest.ko.xz:\n"))
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"kernel/net/deepest.ko.xz", "kernel/net/direct.ko.xz", "kernel/net/a-b.ko.xz"}
	if got := deps.closure("a_b"); !slices.Equal(got, want) {
		t.Errorf("order %v", got)
	}
	if got := deps.closure("none"); got != nil {
		t.Errorf("a module that is not there: %v", got)
	}
	if _, err := parseDependencies(strings.NewReader("no colon\n")); err == nil {
		t.Error("a bad line was accepted")
	}
}

// modulesTree is a tree of one release as depmod leaves it.
func modulesTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	files := map[string]string{
		"modules.builtin": "kernel/drivers/virtio/virtio_pci.ko\nkernel/fs/ext4/ext4.ko\nkernel/drivers/char/virtio_console.ko\n",
		"modules.dep": "kernel/virtio_blk.ko.gz:\nkernel/virtio_net.ko: kernel/net_failover.ko kernel/failover.ko\nkernel/net_failover.ko: kernel/failover.ko\n" +
			"kernel/failover.ko:\nkernel/virtio-rng.ko:\nkernel/overlay.ko:\nkernel/vsock.ko:\nkernel/vmw_vsock_virtio_transport.ko: kernel/vsock.ko\n",
		"kernel/virtio_blk.ko.gz": string(gzipped(t, "blk")), "kernel/virtio_net.ko": "net", "kernel/net_failover.ko": "nf",
		"kernel/failover.ko": "fail", "kernel/virtio-rng.ko": "rng", "kernel/overlay.ko": "overlay",
		"kernel/vsock.ko": "vsock", "kernel/vmw_vsock_virtio_transport.ko": "transport",
	}
	for name, content := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// storeWithKernel holds a made-up kernel "k" of release "1.0", and makes it the default.
func storeWithKernel(t *testing.T) *Store {
	t.Helper()
	s := Open(filepath.Join(t.TempDir(), "kernels"), t.TempDir())
	_, err := s.shelf.Build(func(dir string) (string, any, error) {
		m := Manifest{Name: "k", Release: "1.0", Architecture: "amd64"}
		var err error
		if m.BootModules, err = writeBootModules(modulesTree(t), "1.0", filepath.Join(dir, bootName)); err != nil {
			return "", nil, err
		}
		for _, name := range []string{bzImageName, elfName, modulesName, configName} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte(name), 0o600); err != nil {
				return "", nil, err
			}
		}
		m.Files, err = artifact.Describe(dir, bzImageName, elfName, modulesName, bootName, configName)
		return m.Name, m, err
	})
	if err != nil {
		t.Fatal(err)
	}
	if err := s.shelf.SetDefault("k"); err != nil {
		t.Fatal(err)
	}
	return s
}

func TestGet(t *testing.T) {
	s := Open(filepath.Join(t.TempDir(), "none"), t.TempDir())
	for _, name := range []string{"", "x", "../x"} {
		if _, err := s.Get(t.Context(), name); fault.KindOf(err) != fault.NotFound || fault.HintOf(err) == "" {
			t.Errorf("Get(%q) of an empty store: %v", name, err)
		}
	}
	s = storeWithKernel(t)
	k, err := s.Get(t.Context(), "")
	if err != nil || k.Name != "k" || k.Release != "1.0" {
		t.Fatalf("kernel %+v, error %v", k, err)
	}
	if err := os.WriteFile(k.BzImage, []byte("VMLINUZ"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Get(t.Context(), "k"); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), bzImageName) {
		t.Errorf("a changed boot image: %v", err)
	}
	list, err := s.List(t.Context())
	if err != nil || len(list) != 1 || list[0].Problem == "" {
		t.Errorf("list %+v, error %v", list, err)
	}
}

type archived struct {
	names   []string
	content map[string]string
}

func readArchive(t *testing.T, path string) archived {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	a := archived{content: map[string]string{}}
	for r := cpio.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return a
		}
		if err != nil {
			t.Fatal(err)
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		a.names = append(a.names, h.Name)
		a.content[h.Name] = string(b)
	}
}

func TestInitramfs(t *testing.T) {
	s := storeWithKernel(t)
	k, err := s.Get(t.Context(), "k")
	if err != nil {
		t.Fatal(err)
	}
	agent := filepath.Join(t.TempDir(), "agent")
	if err := os.WriteFile(agent, []byte("agent1"), 0o700); err != nil {
		t.Fatal(err)
	}
	path, modules, err := s.Initramfs(t.Context(), k, agent)
	if err != nil {
		t.Fatal(err)
	}
	want := []string{"1.0/kernel/virtio_blk.ko", "1.0/kernel/failover.ko", "1.0/kernel/net_failover.ko", "1.0/kernel/virtio_net.ko", "1.0/kernel/virtio-rng.ko", "1.0/kernel/overlay.ko"}
	if !slices.Equal(modules, want) {
		t.Errorf("modules %v", modules)
	}
	a := readArchive(t, path)
	if a.content["init"] != "agent1" || a.content["lib/modules/1.0/kernel/virtio_blk.ko"] != "blk" {
		t.Errorf("content %v", a.content)
	}
	for _, name := range a.names { // every directory comes before what is in it
		if dir := filepath.Dir(name); dir != "." && slices.Index(a.names, dir) > slices.Index(a.names, name) || dir != "." && !slices.Contains(a.names, dir) {
			t.Errorf("%s has no directory before it", name)
		}
	}
	if info, err := os.Stat(path); err != nil || info.Size()%4 != 0 {
		t.Errorf("size %d, error %v", info.Size(), err)
	}
	if out := pipe(t, must(os.ReadFile(path)), "cpio", "-itv", "--quiet"); !strings.Contains(string(out), "5,   1 Jan  1  1970 dev/console") {
		t.Errorf("cpio lists:\n%s", out)
	}

	withVsock, modules, err := s.Initramfs(t.Context(), k, agent, "vmw_vsock_virtio_transport")
	if err != nil || withVsock == path || modules[len(modules)-1] != "1.0/kernel/vmw_vsock_virtio_transport.ko" {
		t.Errorf("with vsock: %s, %v, error %v", withVsock, modules, err)
	}
	if _, _, err := s.Initramfs(t.Context(), k, agent, "nonsense"); fault.KindOf(err) != fault.Precondition {
		t.Errorf("an unknown module: %v", err)
	}
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

// What a power cut made of a cached archive is made again, and what a kill left is removed.
func TestInitramfsCacheAfterCrash(t *testing.T) {
	s := storeWithKernel(t)
	k, err := s.Get(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	agent := filepath.Join(t.TempDir(), "agent")
	if err := os.WriteFile(agent, []byte("agent"), 0o700); err != nil {
		t.Fatal(err)
	}
	path, _, err := s.Initramfs(t.Context(), k, agent)
	if err != nil {
		t.Fatal(err)
	}
	good := must(os.ReadFile(path))
	dir := filepath.Dir(path)
	dead, living := filepath.Join(dir, ".new-1"), filepath.Join(dir, ".new-2")
	long := time.Now().Add(-2 * unfinishedAge)
	if err := errors.Join(os.WriteFile(dead, nil, 0o600), os.WriteFile(living, nil, 0o600), os.Chtimes(dead, long, long)); err != nil {
		t.Fatal(err)
	}
	for what, bad := range map[string][]byte{
		"nothing": {}, "half": good[:len(good)/2], "zeros at its end": append(bytes.Clone(good[:len(good)/2]), make([]byte, len(good)/2)...),
	} {
		if err := os.WriteFile(path, bad, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, _, err := s.Initramfs(t.Context(), k, agent); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(must(os.ReadFile(path)), good) {
			t.Errorf("%s was taken for an archive", what)
		}
	}
	if _, err := os.Stat(dead); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("what a kill left is still there: %v", err)
	}
	if _, err := os.Stat(living); err != nil {
		t.Errorf("what somebody is writing was removed: %v", err)
	}
}

func TestInitramfsCache(t *testing.T) {
	s := storeWithKernel(t)
	k, err := s.Get(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	agent := filepath.Join(t.TempDir(), "agent")
	paths := map[string]bool{}
	for i := range initramfsKept + 3 {
		if err := os.WriteFile(agent, fmt.Appendf(nil, "agent%d", i), 0o700); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			path, _, err := s.Initramfs(t.Context(), k, agent)
			if err != nil {
				t.Fatal(err)
			}
			paths[path] = true
			if _, err := os.Stat(path); err != nil {
				t.Errorf("it was forgotten at once: %v", err)
			}
		}
	}
	left, err := os.ReadDir(filepath.Join(s.cache, "initramfs"))
	if err != nil || len(paths) != initramfsKept+3 || len(left) != initramfsKept {
		t.Errorf("%d archives made, %d kept, error %v", len(paths), len(left), err)
	}
}

// TestRealKernel looks at a kernel that was made of Debian's package.
func TestRealKernel(t *testing.T) {
	s := Open(filepath.Join(need.VM(t), "kernels"), t.TempDir())
	k, err := s.Get(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Verify(t.Context(), k.Name); err != nil {
		t.Error(err)
	}
	if k.Architecture == "amd64" {
		checkPVH(t, k.ELF)
	}
	path, modules, err := s.Initramfs(t.Context(), k, "/bin/true")
	if err != nil {
		t.Fatal(err)
	}
	a := readArchive(t, path)
	for _, m := range modules {
		if !strings.HasPrefix(a.content["lib/modules/"+m], "\x7fELF") {
			t.Errorf("module %s is not there or packed", m)
		}
	}
}

// checkPVH looks for the note with the PVH entry point: owner Xen, type 18.
func checkPVH(t *testing.T, path string) {
	t.Helper()
	f, err := elf.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE {
			continue
		}
		notes, err := io.ReadAll(p.Open())
		if err != nil {
			t.Fatal(err)
		}
		if bytes.Contains(notes, []byte("\x12\x00\x00\x00Xen\x00")) {
			return
		}
	}
	t.Errorf("%s has no PVH note", path)
}
