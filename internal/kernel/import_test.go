package kernel

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
)

const testRelease = "6.1.0-test"

// builtInNames are the strings of a kernel that has all built in; in the place of a configuration for vmlinux.
const builtInNames = "\x00virtio-pci\x00virtio_blk\x00virtio_net\x00virtio_console\x00ext4\x00overlay\x00"

// vmlinux is an ELF file that looks like a kernel: it says its version, has the PVH note unless told otherwise, and its
// configuration when there is one.
func vmlinux(t *testing.T, pvh bool, config string) []byte {
	t.Helper()
	note := []byte("\x04\x00\x00\x00\x04\x00\x00\x00\x12\x00\x00\x00Xen\x00\x00\x00\x00\x01")
	if !pvh {
		note[8] = 0x13
	}
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: 1, Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 2, Shentsize: 64,
	}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	const headers = 64 + 2*56
	loaded := elf.Prog64{Type: uint32(elf.PT_LOAD), Off: headers, Filesz: uint64(len(note)), Memsz: uint64(len(note))}
	p := elf.Prog64{Type: uint32(elf.PT_NOTE), Off: headers, Filesz: uint64(len(note)), Memsz: uint64(len(note))}
	var b bytes.Buffer
	if err := errors.Join(binary.Write(&b, binary.LittleEndian, h), binary.Write(&b, binary.LittleEndian, loaded), binary.Write(&b, binary.LittleEndian, p)); err != nil {
		t.Fatal(err)
	}
	b.Write(note)
	if strings.Contains(config, builtInNames) {
		b.WriteString(builtInNames)
		config = ""
	}
	b.WriteString("Linux version %s (template)\x00Linux version " + testRelease + " (someone@somewhere) #1 SMP\n\x00")
	if config != "" {
		b.WriteString("IKCFG_ST")
		b.Write(gzipped(t, config))
		b.WriteString("IKCFG_ED")
	}
	return b.Bytes()
}

func arm64Image() []byte {
	image := make([]byte, 4096)
	copy(image[56:], "ARM\x64")
	return append(image, "Linux version "+testRelease+" (someone@somewhere) #1 SMP\n"...)
}

func zboot(t *testing.T, payload []byte) []byte {
	t.Helper()
	head := make([]byte, 128)
	copy(head, "MZ\x00\x00zimg")
	binary.LittleEndian.PutUint32(head[8:], 128)
	binary.LittleEndian.PutUint32(head[12:], uint32(len(payload)))
	copy(head[24:], "gzip")
	return append(head, payload...)
}

func TestParseKernel(t *testing.T) {
	plain := vmlinux(t, true, "")
	encoder, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	wide := bzImage(plain)
	binary.LittleEndian.PutUint16(wide[0x206:], 0x20c)
	wide[0x236] = 1
	for name, c := range map[string]struct {
		file         []byte
		architecture string
		compressed   bool
	}{
		"ELF":          {plain, "amd64", false},
		"bzImage":      {wide, "amd64", true},
		"bzImage gzip": {bzImage64(gzipped(t, string(plain))), "amd64", true},
		"bzImage zstd": {bzImage64(withSize(encoder.EncodeAll(plain, nil), len(plain))), "amd64", true},
		"bzImage xz":   {bzImage64(withSize(pipe(t, plain, "xz", "--check=crc32", "--x86", "--lzma2=dict=1MiB", "-c"), len(plain))), "amd64", true},
		"bzImage lz4":  {bzImage64(withSize(pipe(t, plain, "lz4", "-l", "-9", "-c"), len(plain))), "amd64", true},
		"ELF packed":   {gzipped(t, string(plain)), "amd64", false},
		"Image":        {arm64Image(), "arm64", false},
		"Image.gz":     {gzipped(t, string(arm64Image())), "arm64", false},
		"zboot":        {zboot(t, gzipped(t, string(arm64Image()))), "arm64", false},
	} {
		t.Run(name, func(t *testing.T) {
			b, err := parseKernel(t.Context(), c.file, c.architecture)
			if err != nil || b.release != testRelease || (b.compressed != nil) != c.compressed || !bytes.Contains(b.plain, []byte("Linux version "+testRelease)) {
				t.Errorf("release %q, error %v", b.release, err)
			}
		})
	}
}

// bzImage64 is a bzImage that says of itself that it is for 64 bits.
func bzImage64(payload []byte) []byte {
	b := bzImage(payload)
	b[0x236] = 1
	return b
}

func TestParseKernelRefuses(t *testing.T) {
	plain := vmlinux(t, true, "")
	module := slices.Clone(plain)
	binary.LittleEndian.PutUint16(module[16:], uint16(elf.ET_REL))
	i386 := slices.Clone(plain)
	binary.LittleEndian.PutUint16(i386[18:], uint16(elf.EM_386))
	narrow := bzImage(plain)
	narrow[0x236] = 0
	flipped := bzImage64(gzipped(t, string(plain)))
	flipped[len(flipped)-60] ^= 0xff
	for name, c := range map[string]struct {
		file         []byte
		architecture string
		kind         fault.Kind
		says         string
	}{
		"text":             {bytes.Repeat([]byte("text "), 1000), "amd64", fault.Usage, "begins with"},
		"nothing":          {nil, "amd64", fault.Usage, "no Linux kernel"},
		"initramfs":        {append([]byte("070701"), make([]byte, 1000)...), "amd64", fault.Usage, "initramfs"},
		"packed initramfs": {gzipped(t, "070701"+strings.Repeat("x", 1000)), "amd64", fault.Usage, "initramfs"},
		"module":           {module, "amd64", fault.Usage, "module"},
		"32-bit ELF":       {i386, "amd64", fault.Usage, "EM_386"},
		"32-bit bzImage":   {narrow, "amd64", fault.Usage, "32-bit"},
		"no PVH":           {vmlinux(t, false, ""), "amd64", fault.Precondition, "PVH"},
		"arm64 here":       {arm64Image(), "amd64", fault.Usage, "arm64"},
		"zboot here":       {zboot(t, gzipped(t, string(arm64Image()))), "amd64", fault.Usage, "UEFI"},
		"amd64 there":      {bzImage64(plain), "arm64", fault.Usage, "amd64"},
		"program":          {append(plain[:200:200], "no version"...), "amd64", fault.Usage, "version"},
		"u-boot":           {append([]byte("\x27\x05\x19\x56"), make([]byte, 1000)...), "arm64", fault.Usage, "U-Boot"},
		"flipped":          {flipped, "amd64", fault.Precondition, "unpack"},
		"ELF cut short":    {plain[:180], "amd64", fault.Usage, "loaded from"},
		"cut short":        {bzImage64(gzipped(t, string(plain)))[:2200], "amd64", fault.Precondition, "outside"},
		"zboot outside":    {zboot(t, gzipped(t, "x"))[:130], "arm64", fault.Usage, "outside"},
		"packed for ever":  {gzipped(t, string(gzipped(t, string(plain)))), "amd64", fault.Usage, "more than once"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := parseKernel(t.Context(), c.file, c.architecture)
			if fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v", err)
			}
		})
	}
}

func FuzzParseKernel(f *testing.F) {
	f.Add(arm64Image(), true)
	f.Add(bzImage([]byte("\x1f\x8bx")), false)
	f.Add([]byte("\x7fELF\x02\x01\x01"), false)
	f.Fuzz(func(t *testing.T, file []byte, arm bool) {
		architecture := "amd64"
		if arm {
			architecture = "arm64"
		}
		if b, err := parseKernel(t.Context(), file, architecture); err == nil && b.release == "" {
			t.Error("a kernel without a release")
		}
	})
}

const builtInConfig = "CONFIG_VIRTIO_PCI=y\nCONFIG_VIRTIO_BLK=y\nCONFIG_VIRTIO_NET=y\nCONFIG_VIRTIO_CONSOLE=y\nCONFIG_EXT4_FS=y\nCONFIG_OVERLAY_FS=y\n"

func writeKernel(t *testing.T, name string, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestImportFile(t *testing.T) {
	need.Architecture(t, "amd64") // as its kernels are
	s := Open(filepath.Join(t.TempDir(), "kernels"), t.TempDir())
	k, err := s.Import(t.Context(), ImportOptions{Source: writeKernel(t, "bzImage", bzImage64(vmlinux(t, true, builtInConfig)))}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if k.Name != testRelease || k.ModulesDisk != "" || !slices.Equal(k.Formats(), []string{"bzimage", "elf"}) {
		t.Errorf("kernel %+v", k)
	}
	agent := writeKernel(t, "agent", []byte("agent"))
	archive, modules, err := s.Initramfs(t.Context(), k, agent)
	if err != nil || len(modules) != 0 || !whole(archive) {
		t.Errorf("initramfs with modules %v, error %v", modules, err)
	}
	if k, err := s.Import(t.Context(), ImportOptions{Source: writeKernel(t, "vmlinux", vmlinux(t, true, builtInNames)), Name: "own"}, nil); err != nil || k.BzImage != "" || k.Name != "own" {
		t.Errorf("an ELF alone, of which the configuration is not known: %+v, %v", k, err)
	}
	if _, _, err := s.CheckConfig(t.Context(), "own"); fault.KindOf(err) != fault.Precondition {
		t.Errorf("check without a configuration: %v", err)
	}
	_, options, err := s.CheckConfig(t.Context(), testRelease)
	if err != nil {
		t.Fatal(err)
	}
	on := func(name string) bool {
		return slices.ContainsFunc(options, func(o Option) bool { return o.Name == name && o.OK })
	}
	if !on("VIRTIO_BLK") || on("DEVTMPFS") || on("VETH") {
		t.Errorf("options %+v", options)
	}
}

func TestImportFileRefuses(t *testing.T) {
	need.Architecture(t, "amd64") // as its kernels are
	s := Open(filepath.Join(t.TempDir(), "kernels"), t.TempDir())
	good := writeKernel(t, "bzImage", bzImage64(vmlinux(t, true, builtInNames)))
	silent := writeKernel(t, "silent", bzImage64(vmlinux(t, true, "")))
	unindexed := filepath.Join(t.TempDir(), testRelease)
	if err := errors.Join(os.MkdirAll(filepath.Join(unindexed, "kernel"), 0o755), os.WriteFile(filepath.Join(unindexed, "modules.dep"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	modular := writeKernel(t, "modular", bzImage64(vmlinux(t, true, strings.ReplaceAll(builtInConfig, "BLK=y", "BLK=m"))))
	without := writeKernel(t, "without", bzImage64(vmlinux(t, true, strings.ReplaceAll(builtInConfig, "CONFIG_OVERLAY_FS=y", "# CONFIG_OVERLAY_FS is not set"))))
	pipe := filepath.Join(t.TempDir(), "pipe")
	if err := unix.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		o    ImportOptions
		kind fault.Kind
		says string
	}{
		"modules missing":  {ImportOptions{Source: modular}, fault.Precondition, "no virtio_blk built in"},
		"modules unnamed":  {ImportOptions{Source: silent}, fault.Precondition, "no virtio_pci built in"},
		"modules in part":  {ImportOptions{Source: good, Modules: unindexed}, fault.Precondition, "not whole"},
		"option off":       {ImportOptions{Source: without}, fault.Precondition, "no overlay built in"},
		"no file":          {ImportOptions{Source: "/nowhere/bzImage"}, fault.NotFound, "no file"},
		"directory":        {ImportOptions{Source: t.TempDir()}, fault.Usage, "no file"},
		"empty":            {ImportOptions{Source: writeKernel(t, "empty", nil)}, fault.Usage, "empty"},
		"relative":         {ImportOptions{Source: "bzImage"}, fault.Usage, "absolute"},
		"no modules there": {ImportOptions{Source: good, Modules: t.TempDir()}, fault.Usage, "no directory of modules"},
		"other modules":    {ImportOptions{Source: good, Modules: modulesTree(t)}, fault.Precondition, "another kernel"},
		"no configuration": {ImportOptions{Source: good, Config: good}, fault.Usage, "configuration"},
		"endless":          {ImportOptions{Source: "/dev/zero"}, fault.Usage, "no file"},
		"pipe":             {ImportOptions{Source: pipe}, fault.Usage, "no file"},
		"pipe beside":      {ImportOptions{Source: good, Config: pipe}, fault.Usage, "no file"},
		"bad name":         {ImportOptions{Source: good, Name: "../x"}, fault.Usage, "cannot name"},
		"broken package":   {ImportOptions{Source: writeKernel(t, "x.deb", []byte("!<arch>\nnonsense"))}, fault.Precondition, ""},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := s.Import(t.Context(), c.o, nil)
			if fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v", err)
			}
		})
	}
	if names, _ := s.shelf.Names(); len(names) > 0 {
		t.Errorf("there are kernels %v", names)
	}
	for i := range 2 { // a kernel does not change under its name
		_, err := s.Import(t.Context(), ImportOptions{Source: good}, nil)
		if i == 1 && fault.KindOf(err) != fault.Conflict || i == 0 && err != nil {
			t.Errorf("import %d: %v", i, err)
		}
	}
}

// hostTree is a host with a kernel in /boot, and its modules, which depmod has not seen yet unless indexed.
func hostTree(t *testing.T, indexed bool) string {
	t.Helper()
	root := t.TempDir()
	modules := filepath.Join(root, "lib/modules", testRelease)
	if err := errors.Join(
		os.MkdirAll(filepath.Join(root, "boot"), 0o755),
		os.MkdirAll(filepath.Join(root, "lib/modules"), 0o755),
		os.WriteFile(filepath.Join(root, "boot/vmlinuz-"+testRelease), bzImage64(vmlinux(t, true, "")), 0o600),
		os.WriteFile(filepath.Join(root, "boot/config-"+testRelease), []byte(builtInConfig), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	if indexed {
		if err := os.Rename(modulesTree(t), modules); err != nil {
			t.Fatal(err)
		}
		return root
	}
	builtIn := ""
	for _, name := range bootModules {
		builtIn += "kernel/" + name + ".ko\n"
	}
	if err := errors.Join(
		os.MkdirAll(filepath.Join(modules, "kernel"), 0o755),
		os.WriteFile(filepath.Join(modules, "modules.builtin"), []byte(builtIn), 0o600),
		os.WriteFile(filepath.Join(modules, "modules.order"), nil, 0o600),
	); err != nil {
		t.Fatal(err)
	}
	return root
}

func TestHostKernel(t *testing.T) {
	need.Architecture(t, "amd64") // as its kernels are
	root := hostTree(t, true)
	o, err := hostKernel(ImportOptions{Release: testRelease}, root)
	if err != nil {
		t.Fatal(err)
	}
	s := Open(filepath.Join(t.TempDir(), "kernels"), t.TempDir())
	k, err := s.importAs(t.Context(), o, nil)
	if err != nil {
		t.Fatal(err)
	}
	if k.Name != testRelease || k.ModulesDisk == "" || len(k.Manifest.BootModules) < 5 {
		t.Errorf("kernel %+v", k)
	}
	if out, err := exec.Command(need.Binary(t, "e2fsck"), "-fn", k.ModulesDisk).CombinedOutput(); err != nil {
		t.Errorf("e2fsck: %v\n%s", err, out)
	}
	if _, err := hostKernel(ImportOptions{Release: "5.0"}, root); fault.KindOf(err) != fault.NotFound || !strings.Contains(fault.HintOf(err), testRelease) {
		t.Errorf("a kernel that the host does not have: %v, hint %q", err, fault.HintOf(err))
	}
}

func TestImportPackage(t *testing.T) {
	need.Architecture(t, "amd64") // as its kernels are
	need.Binary(t, "depmod")
	root := hostTree(t, false)
	control := "Package: linux-image-test\nVersion: 6.1-1\nArchitecture: amd64\nMaintainer: nobody <nobody@example.org>\nDescription: test\n"
	if err := errors.Join(
		os.MkdirAll(filepath.Join(root, "DEBIAN"), 0o755),
		os.WriteFile(filepath.Join(root, "DEBIAN/control"), []byte(control), 0o600),
	); err != nil {
		t.Fatal(err)
	}
	deb := filepath.Join(t.TempDir(), "kernel.deb")
	if out, err := exec.Command(need.Binary(t, "dpkg-deb"), "--root-owner-group", "-b", root, deb).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	s := Open(filepath.Join(t.TempDir(), "kernels"), t.TempDir())
	whole, err := os.ReadFile(deb)
	if err != nil {
		t.Fatal(err)
	}
	for _, part := range []int{4, 2} { // in this or that place
		cut := writeKernel(t, "cut.deb", whole[:len(whole)-len(whole)/part])
		if _, err := s.Import(t.Context(), ImportOptions{Source: cut, Name: "cut"}, nil); fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "damaged") {
			t.Errorf("a package without its last 1/%d: %v", part, err)
		}
	}
	k, err := s.Import(t.Context(), ImportOptions{Source: deb, Name: "packaged"}, nil)
	if err != nil {
		t.Fatal(err)
	}
	if k.Name != "packaged" || k.Manifest.Package != "linux-image-test" || k.Manifest.Version != "6.1-1" || k.ELF == "" {
		t.Errorf("kernel %+v", k)
	}
	if told := s.Reconcile(); len(told) != 1 || !strings.Contains(told[0], "the only one") {
		t.Errorf("the only kernel: %q", told)
	}
	if err := s.Delete(t.Context(), "packaged", func(string) error { return nil }); fault.KindOf(err) != fault.Conflict {
		t.Errorf("the default kernel: %v", err)
	}
}
