package disk

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"
)

// maxCompact is the largest compact file system; it fixes how much room its block descriptors get.
const maxCompact = 64 << 30

// WriteExt4 writes the files of a tar stream to out as a compact ext4 for read-only use, from the
// first byte on: no journal, no free space. Owners, modes, times, extended attributes, devices
// and hard links are kept; link targets must come before their links.
func WriteExt4(ctx context.Context, tarStream io.Reader, out io.ReadWriteSeeker) error {
	r := &contextReader{ctx: ctx, r: tarStream}
	if err := tar2ext4.ConvertTarToExt4(r, out, tar2ext4.MaximumDiskSize(maxCompact)); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return spaceFault(fmt.Errorf("cannot write the tar stream as ext4: %w", err), nameOf(out))
	}
	if _, err := io.Copy(io.Discard, r); err != nil { // the padding of the stream's end
		return err
	}
	if err := padInodeBitmaps(out); err != nil {
		return spaceFault(fmt.Errorf("cannot finish the ext4: %w", err), nameOf(out))
	}
	return nil
}

func nameOf(w any) string {
	if f, ok := w.(*os.File); ok {
		return f.Name()
	}
	return "a file system"
}

type contextReader struct {
	ctx context.Context
	r   io.Reader
}

func (c *contextReader) Read(b []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(b)
}

// padInodeBitmaps sets the bits behind the last inode of each group, which tar2ext4 leaves zero
// and e2fsck complains about. Its file systems have 32-byte descriptors and no checksums.
func padInodeBitmaps(f io.ReadWriteSeeker) error {
	const blockSize, descriptorSize = 4096, 32
	var super [1024]byte
	if err := readAt(f, super[:], 1024); err != nil {
		return err
	}
	le := binary.LittleEndian
	blocks, perGroup, inodes := le.Uint32(super[0x4:]), le.Uint32(super[0x20:]), le.Uint32(super[0x28:])
	if perGroup == 0 || le.Uint32(super[0x18:]) != 2 || inodes > blockSize*8 {
		return errors.New("unexpected file system geometry")
	}
	if inodes == blockSize*8 { // the bitmaps are full
		return nil
	}
	groups := (blocks + perGroup - 1) / perGroup
	descriptors := make([]byte, groups*descriptorSize)
	if err := readAt(f, descriptors, blockSize); err != nil {
		return err
	}
	padding := make([]byte, blockSize-inodes/8) // the number of inodes is a multiple of 8
	for i := range padding {
		padding[i] = 0xff
	}
	for g := range groups {
		bitmap := le.Uint32(descriptors[g*descriptorSize+4:])
		if _, err := f.Seek(int64(bitmap)*blockSize+int64(inodes/8), io.SeekStart); err != nil {
			return err
		}
		if _, err := f.Write(padding); err != nil {
			return err
		}
	}
	return nil
}

func readAt(f io.ReadSeeker, b []byte, at int64) error {
	if _, err := f.Seek(at, io.SeekStart); err != nil {
		return err
	}
	_, err := io.ReadFull(f, b)
	return err
}
