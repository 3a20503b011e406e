package disk

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"time"

	"github.com/Microsoft/hcsshim/ext4/tar2ext4"

	"banger/internal/fileio"
)

// maxCompact is the largest compact file system; it fixes how much room its block descriptors get.
const maxCompact = 64 << 30

// WriteExt4 writes the files of a tar stream to out as a compact ext4 for read-only use, from the
// first byte on: no journal, no free space. Owners, modes, times, extended attributes, devices
// and hard links are kept; link targets must come before their links.
func WriteExt4(ctx context.Context, tarStream io.Reader, out io.ReadWriteSeeker) error {
	r := fileio.Until(ctx, tarStream)
	if err := tar2ext4.ConvertTarToExt4(r, out, tar2ext4.MaximumDiskSize(maxCompact)); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if isFull(err) {
			return spaceFault(err, nameOf(out))
		}
		return fmt.Errorf("cannot write the tar stream as ext4: %w", err)
	}
	if _, err := io.Copy(io.Discard, r); err != nil { // the padding of the stream's end
		return err
	}
	if err := finishCompact(out); err != nil {
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

// finishCompact mends what tar2ext4 leaves wrong.
func finishCompact(f io.ReadWriteSeeker) error {
	g, err := readGeometry(f)
	if err != nil {
		return err
	}
	return errors.Join(padInodeBitmaps(f, g), mendInodes(f, g))
}

// padInodeBitmaps sets the bits behind the last inode of each group, which tar2ext4 leaves zero
// and e2fsck complains about. Its file systems have 32-byte descriptors and no checksums.
func padInodeBitmaps(f io.ReadWriteSeeker, g geometry) error {
	if g.perGroup == compactBlock*8 { // the bitmaps are full
		return nil
	}
	padding := bytes.Repeat([]byte{0xff}, compactBlock-int(g.perGroup)/8) // the number of inodes is a multiple of 8
	for i := range g.groups {
		bitmap := binary.LittleEndian.Uint32(g.descriptors[i*compactDescriptor+4:])
		if err := writeAt(f, padding, int64(bitmap)*compactBlock+int64(g.perGroup/8)); err != nil {
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

func writeAt(f io.WriteSeeker, b []byte, at int64) error {
	if _, err := f.Seek(at, io.SeekStart); err != nil {
		return err
	}
	_, err := f.Write(b)
	return err
}

// Times that an ext4 can tell (Documentation/filesystems/ext4/inodes.rst), from 1901 to 2446.
var (
	earliest = time.Unix(math.MinInt32, 0)
	latest   = time.Unix(math.MaxInt32+3<<32, 0)
)

// Tellable returns the nearest time that an ext4 can tell of a file.
func Tellable(at time.Time) time.Time {
	switch {
	case at.Before(earliest):
		return earliest
	case at.After(latest):
		return latest
	}
	return at
}
