package fctest

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
)

// Kernel is the shortest x86-64 ELF file that has a program: what the fake takes for a kernel.
func Kernel() []byte { return image([]byte{0xf4}) }

// Where a guest's code is loaded and begins: the first address that a VMM takes a kernel at.
const loadAddress = 0x100000

// image is an ELF executable of one segment.
func image(code []byte) []byte {
	const headers = 0x1000
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(elf.EM_X86_64), Version: uint32(elf.EV_CURRENT), Entry: loadAddress,
		Phoff: 64, Ehsize: 64, Phentsize: 56, Phnum: 1, Shentsize: 64,
	}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	p := elf.Prog64{
		Type: uint32(elf.PT_LOAD), Flags: uint32(elf.PF_R | elf.PF_W | elf.PF_X), Off: headers, Vaddr: loadAddress, Paddr: loadAddress,
		Filesz: uint64(len(code)), Memsz: uint64(len(code)), Align: headers,
	}
	var b bytes.Buffer
	_ = binary.Write(&b, binary.LittleEndian, h) // a buffer takes everything
	_ = binary.Write(&b, binary.LittleEndian, p)
	b.Write(make([]byte, headers-b.Len()))
	b.Write(code)
	return b.Bytes()
}
