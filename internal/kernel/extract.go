package kernel

import (
	"bytes"
	"compress/gzip"
	"context"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/klauspost/compress/zstd"

	"banger/internal/fault"
	"banger/internal/system"
)

const (
	maxELF    = 512 << 20 // bytes; a distribution's vmlinux has some 50 MB
	maxWindow = 128 << 20
)

// extractELF returns the vmlinux inside a bzImage, as Documentation/arch/x86/boot.rst of the kernel
// describes it: the setup header names where the packed payload lies.
func extractELF(ctx context.Context, bzImage []byte) ([]byte, error) {
	payload, err := payloadOf(bzImage)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "not a kernel image for this processor")
	}
	unpacked, err := unpackPayload(ctx, payload)
	if size := binary.LittleEndian.Uint32(payload[max(0, len(payload)-4):]); err == nil && !isELF(payload) && uint32(len(unpacked)) != size {
		err = fmt.Errorf("%d bytes instead of %d", len(unpacked), size)
	}
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot unpack the kernel image")
	}
	f, err := elf.NewFile(bytes.NewReader(unpacked))
	if err == nil {
		err = wholeELF(f, len(unpacked))
	}
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "the kernel image holds no ELF file")
	}
	return unpacked, nil
}

func isELF(b []byte) bool { return bytes.HasPrefix(b, []byte(elf.ELFMAG)) }

// wholeELF finds an ELF file that was cut short: what it is loaded from must be there.
func wholeELF(f *elf.File, size int) error {
	for _, p := range f.Progs {
		if end := p.Off + p.Filesz; p.Type == elf.PT_LOAD && (end < p.Off || end > uint64(size)) {
			return fmt.Errorf("it ends at %d bytes, and is loaded from as many as %d", size, end)
		}
	}
	return nil
}

func payloadOf(image []byte) ([]byte, error) {
	const headerEnd = 0x250
	if len(image) < headerEnd || binary.LittleEndian.Uint16(image[0x1fe:]) != 0xaa55 || string(image[0x202:0x206]) != "HdrS" {
		return nil, errors.New("no setup header")
	}
	if version := binary.LittleEndian.Uint16(image[0x206:]); version < 0x208 {
		return nil, fmt.Errorf("boot protocol %#x is too old", version)
	}
	setupSectors := int64(image[0x1f1])
	if setupSectors == 0 {
		setupSectors = 4
	}
	start := (setupSectors+1)*512 + int64(binary.LittleEndian.Uint32(image[0x248:]))
	end := start + int64(binary.LittleEndian.Uint32(image[0x24c:]))
	if start >= end || end > int64(len(image)) {
		return nil, errors.New("the payload lies outside the file")
	}
	return image[start:end], nil
}

// unpackPayload unpacks by the first bytes. Behind every format but gzip, which ends with it anyway, the kernel's build
// puts the unpacked size, four bytes.
func unpackPayload(ctx context.Context, p []byte) ([]byte, error) {
	starts := func(magic string) bool { return bytes.HasPrefix(p, []byte(magic)) }
	if len(p) < 8 {
		return nil, errors.New("the payload is too short")
	}
	body := p[:len(p)-4]
	switch {
	case starts("\x1f\x8b"):
		r, err := gzip.NewReader(bytes.NewReader(p))
		if err != nil {
			return nil, err
		}
		r.Multistream(false)
		return readBounded(r)
	case starts("\xfd7zXZ\x00"):
		return unpackXZ(ctx, body)
	case starts("\x28\xb5\x2f\xfd"):
		r, err := zstd.NewReader(bytes.NewReader(body), zstd.WithDecoderMaxMemory(maxWindow))
		if err != nil {
			return nil, err
		}
		defer r.Close()
		return readBounded(r)
	case starts("\x02\x21\x4c\x18"):
		return unpackLZ4(body)
	case isELF(p):
		return p, nil
	}
	return nil, fmt.Errorf("unknown compression (begins with % x)", p[:4])
}

func readBounded(r io.Reader) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r, maxELF+1))
	if err == nil && len(b) > maxELF {
		err = errTooLarge
	}
	return b, err
}

var errTooLarge = fmt.Errorf("more than %d bytes unpacked", maxELF)

// unpackXZ has the program xz do it: kernels are packed with a filter for x86 code, which no Go
// library undoes.
func unpackXZ(ctx context.Context, body []byte) ([]byte, error) {
	xz, err := system.Find("xz", "xz-utils")
	if err != nil {
		return nil, err
	}
	out := &boundedBuffer{}
	_, err = system.Run(ctx, system.Command{
		Path: xz, Args: []string{"-dc"}, Stdin: bytes.NewReader(body), Stdout: out, Timeout: 2 * time.Minute,
	})
	return out.b.Bytes(), err
}

type boundedBuffer struct{ b bytes.Buffer }

func (w *boundedBuffer) Write(p []byte) (int, error) {
	if w.b.Len()+len(p) > maxELF {
		return 0, errTooLarge
	}
	return w.b.Write(p)
}

// unpackLZ4 reads the legacy frame of lz4: after the magic, blocks with their packed size in front,
// each of at most 8 MiB unpacked and independent of the others.
func unpackLZ4(p []byte) ([]byte, error) {
	var out []byte
	for p = p[4:]; len(p) > 0; {
		if len(p) < 4 {
			return nil, io.ErrUnexpectedEOF
		}
		size := int64(binary.LittleEndian.Uint32(p))
		if size > int64(len(p)-4) {
			return nil, io.ErrUnexpectedEOF
		}
		var err error
		if out, err = unpackLZ4Block(out, p[4:4+size]); err != nil {
			return nil, err
		}
		p = p[4+size:]
	}
	return out, nil
}

var errLZ4 = errors.New("damaged lz4 block")

// unpackLZ4Block appends the content of one block, in the LZ4 block format: a token with two
// lengths, literals, and a copy of what came before.
func unpackLZ4Block(out, p []byte) ([]byte, error) {
	const most = 8 << 20
	begin := len(out)
	for len(p) > 0 {
		token := p[0]
		p = p[1:]
		literals, rest, ok := lz4Length(int(token>>4), p)
		if !ok || literals > len(rest) || len(out)-begin+literals > most {
			return nil, errLZ4
		}
		out, p = append(out, rest[:literals]...), rest[literals:]
		if len(p) == 0 {
			break // the last sequence has literals only
		}
		if len(p) < 2 {
			return nil, errLZ4
		}
		back := int(binary.LittleEndian.Uint16(p))
		match, rest, ok := lz4Length(int(token&15), p[2:])
		match += 4
		if !ok || back == 0 || back > len(out)-begin || len(out)-begin+match > most {
			return nil, errLZ4
		}
		p = rest
		for range match { // byte by byte: source and target may overlap
			out = append(out, out[len(out)-back])
		}
	}
	if len(out) > maxELF {
		return nil, errTooLarge
	}
	return out, nil
}

// lz4Length reads the bytes that lengthen a length of 15.
func lz4Length(n int, p []byte) (length int, rest []byte, ok bool) {
	if n < 15 {
		return n, p, true
	}
	for i, b := range p {
		n += int(b)
		if b != 255 {
			return n, p[i+1:], true
		}
	}
	return 0, nil, false
}
