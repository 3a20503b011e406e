package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"regexp"
	"slices"

	"banger/internal/debian"
	"banger/internal/fault"
)

// boot is a kernel file taken apart.
type boot struct {
	compressed []byte // bzImage of amd64, as it was; nil: there is none
	plain      []byte // vmlinux of amd64, Image of arm64
	release    string
}

// parseKernel tells what a kernel file is, for the processor of that architecture (as Go calls it), and takes it apart.
// Anything else is a Usage fault that says what the file is instead.
func parseKernel(ctx context.Context, file []byte, architecture string) (b boot, err error) {
	switch {
	case len(file) > 0x206 && string(file[0x202:0x206]) == "HdrS":
		b, err = parseBzImage(ctx, file, architecture)
	case bytes.HasPrefix(file, []byte("\x7fELF")):
		b, err = parseELF(file, architecture)
	case isArm64Image(file):
		b.plain = file
		if architecture != "arm64" {
			err = otherProcessor("arm64", architecture)
		}
	case len(file) > 64 && bytes.HasPrefix(file, []byte("MZ\x00\x00zimg")):
		b, err = parseZboot(file, architecture)
	case bytes.HasPrefix(file, []byte("\x1f\x8b")):
		b, err = parseGzip(ctx, file, architecture)
	default:
		err = fault.New(fault.Usage, "the file is no Linux kernel: %s", whatElse(file))
	}
	if err != nil {
		return b, err
	}
	if b.release == "" {
		b.release, err = releaseOf(b.plain)
	}
	return b, err
}

func otherProcessor(is, want string) error {
	return fault.New(fault.Usage, "the kernel is for %s, this machine runs %s", is, want)
}

// others are files that are taken for kernels, by how they begin.
var others = []struct{ magic, what string }{
	{"070701", "it is an initramfs"},
	{"070702", "it is an initramfs"},
	{"\x27\x05\x19\x56", "it is a U-Boot image; banger takes the Image inside"},
	{"\xd0\x0d\xfe\xed", "it is a device tree or a FIT image"},
	{"MZ", "it is a program for UEFI, or a unified kernel image; banger takes the kernel inside"},
	{"!<arch>\n", "it is a package"},
	{"\x28\xb5\x2f\xfd", "it is packed with zstd; unpack it first"},
	{"\xfd7zXZ\x00", "it is packed with xz; unpack it first"},
}

func whatElse(file []byte) string {
	for _, o := range others {
		if bytes.HasPrefix(file, []byte(o.magic)) {
			return o.what
		}
	}
	return fmt.Sprintf("it begins with % x", file[:min(len(file), 8)])
}

// parseBzImage: Documentation/arch/x86/boot.rst.
func parseBzImage(ctx context.Context, file []byte, architecture string) (boot, error) {
	const xloadflags, kernel64 = 0x236, 1
	if architecture != "amd64" {
		return boot{}, otherProcessor("amd64", architecture)
	}
	if len(file) > xloadflags && binary.LittleEndian.Uint16(file[0x206:]) >= 0x20c && file[xloadflags]&kernel64 == 0 {
		return boot{}, fault.New(fault.Usage, "the kernel is for 32-bit processors")
	}
	vmlinux, err := extractELF(ctx, file)
	if err != nil {
		return boot{}, err
	}
	b, err := parseELF(vmlinux, architecture)
	b.compressed = file
	return b, err
}

func parseELF(file []byte, architecture string) (boot, error) {
	f, err := elf.NewFile(bytes.NewReader(file))
	if err == nil {
		err = wholeELF(f, len(file))
	}
	if err != nil {
		return boot{}, fault.Wrap(fault.Usage, err, "the ELF file is damaged")
	}
	want := map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}[architecture]
	switch {
	case f.Type == elf.ET_REL:
		return boot{}, fault.New(fault.Usage, "the file is no Linux kernel: it is a module or an object file")
	case f.Machine != want || f.Class != elf.ELFCLASS64:
		return boot{}, otherProcessor(f.Machine.String(), architecture)
	case architecture == "arm64":
		return boot{}, fault.New(fault.Usage, "on arm64 kernels are booted from their Image, this is the vmlinux beside it").
			WithHint("import arch/arm64/boot/Image")
	}
	release, err := releaseOf(file)
	if err != nil {
		return boot{}, err
	}
	if !hasPVH(f) {
		return boot{}, fault.New(fault.Precondition, "kernel %s has no PVH entry, by which it would be started", release).
			WithHint("build it with CONFIG_PVH=y, or import a distribution's kernel")
	}
	return boot{plain: file, release: release}, nil
}

// hasPVH finds the note XEN_ELFNOTE_PHYS32_ENTRY (xen/include/public/elfnote.h: type 18 of "Xen").
func hasPVH(f *elf.File) bool {
	const physicalEntry = 18
	for _, p := range f.Progs {
		if p.Type != elf.PT_NOTE || p.Filesz > 1<<20 {
			continue
		}
		notes := make([]byte, p.Filesz)
		if _, err := p.ReadAt(notes, 0); err != nil {
			continue
		}
		for len(notes) >= 12 {
			name, size := align4(f.ByteOrder.Uint32(notes)), align4(f.ByteOrder.Uint32(notes[4:]))
			kind := f.ByteOrder.Uint32(notes[8:])
			if uint64(12)+name+size > uint64(len(notes)) {
				break
			}
			if kind == physicalEntry && bytes.HasPrefix(notes[12:], []byte("Xen\x00")) {
				return true
			}
			notes = notes[12+name+size:]
		}
	}
	return false
}

func align4(n uint32) uint64 { return (uint64(n) + 3) &^ 3 }

// isArm64Image: Documentation/arch/arm64/booting.rst, "magic" at 56.
func isArm64Image(file []byte) bool {
	return len(file) > 64 && string(file[56:60]) == "ARM\x64"
}

// parseZboot takes the Image out of an EFI zboot program (drivers/firmware/efi/libstub/zboot-header.S of the
// kernel: offset and size of the payload at 8 and 12, how it is packed at 24).
func parseZboot(file []byte, architecture string) (boot, error) {
	if architecture != "arm64" {
		return boot{}, fault.New(fault.Usage, "the file is no Linux kernel for this machine: it is a packed one for UEFI")
	}
	start, size := uint64(binary.LittleEndian.Uint32(file[8:])), uint64(binary.LittleEndian.Uint32(file[12:]))
	if start+size > uint64(len(file)) {
		return boot{}, fault.New(fault.Usage, "the kernel is damaged: its payload lies outside the file")
	}
	r, err := debian.Decompress(bytes.NewReader(file[start : start+size]))
	if err != nil {
		return boot{}, fault.Wrap(fault.Usage, err, "cannot unpack the kernel")
	}
	defer func() { _ = r.Close() }()
	image, err := readBounded(r)
	if err == nil && !isArm64Image(image) {
		err = errors.New("there is no Image for arm64 in it")
	}
	if err != nil {
		return boot{}, fault.Wrap(fault.Usage, err, "cannot unpack the kernel")
	}
	return boot{plain: image}, nil
}

// parseGzip takes an Image.gz, or a vmlinux that somebody packed.
func parseGzip(ctx context.Context, file []byte, architecture string) (boot, error) {
	r, err := gzip.NewReader(bytes.NewReader(file))
	if err != nil {
		return boot{}, fault.Wrap(fault.Usage, err, "the file is damaged")
	}
	inside, err := readBounded(r)
	if err != nil {
		return boot{}, fault.Wrap(fault.Usage, err, "the file is damaged")
	}
	if bytes.HasPrefix(inside, []byte("\x1f\x8b")) {
		return boot{}, fault.New(fault.Usage, "the file is no Linux kernel: it is packed more than once")
	}
	return parseKernel(ctx, inside, architecture)
}

// banner is how init/version.c of the kernel begins to tell which one it is.
var banner = regexp.MustCompile(`Linux version ([0-9][A-Za-z0-9._+~-]{2,80}) \(`)

func releaseOf(image []byte) (string, error) {
	found := banner.FindSubmatch(image)
	if found == nil {
		return "", fault.New(fault.Usage, "the file is no Linux kernel: it does not say which version it is")
	}
	return string(found[1]), nil
}

// embeddedConfig returns the configuration that a kernel has in it (CONFIG_IKCONFIG, kernel/configs.c: a
// gzip stream between two marks), or nil.
func embeddedConfig(image []byte) []byte {
	_, rest, ok := bytes.Cut(image, []byte("IKCFG_ST"))
	if !ok {
		return nil
	}
	r, err := gzip.NewReader(bytes.NewReader(rest))
	if err != nil {
		return nil
	}
	r.Multistream(false)
	config, err := readBounded(r)
	if err != nil {
		return nil
	}
	return config
}

// Formats returns the forms in which the kernel is there, as drivers call them.
func (k Kernel) Formats() []string {
	var formats []string
	switch {
	case k.Architecture == "arm64" && k.BzImage != "":
		formats = append(formats, "image")
	case k.BzImage != "":
		formats = append(formats, "bzimage")
	}
	if k.Architecture != "arm64" && k.ELF != "" {
		formats = append(formats, "elf")
	}
	slices.Sort(formats)
	return formats
}
