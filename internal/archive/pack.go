package archive

import (
	"archive/tar"
	"context"
	"errors"
	"io"
	"os"
	"time"

	"github.com/klauspost/compress/zstd"

	"banger/internal/fault"
	"banger/internal/fileio"
)

// Entry is one file to pack.
type Entry struct {
	Name string // in the archive, slash-separated
	Path string // of the file; when "", Data is its content
	Data []byte
}

// Pack writes the entries as a tar stream, compressed with zstd. The same files give the same bytes: times and owners are
// not in it.
func Pack(ctx context.Context, w io.Writer, entries []Entry) error {
	z, err := zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.SpeedDefault), zstd.WithEncoderConcurrency(1), zstd.WithWindowSize(4<<20))
	if err != nil {
		return err
	}
	t := tar.NewWriter(z)
	for _, e := range entries {
		if err := e.write(ctx, t); err != nil {
			return errors.Join(err, z.Close())
		}
	}
	return errors.Join(t.Close(), z.Close())
}

func (e Entry) write(ctx context.Context, t *tar.Writer) (err error) {
	h := &tar.Header{Typeflag: tar.TypeReg, Name: e.Name, Mode: 0o644, Size: int64(len(e.Data)), ModTime: time.Unix(0, 0), Format: tar.FormatPAX}
	if e.Path == "" {
		if err := t.WriteHeader(h); err != nil {
			return err
		}
		_, err := t.Write(e.Data)
		return err
	}
	f, err := os.Open(e.Path)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot pack %s", e.Name)
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	info, err := f.Stat()
	if err != nil || !info.Mode().IsRegular() {
		return fault.Wrap(fault.Precondition, err, "cannot pack %s: it is no file", e.Path)
	}
	h.Size = info.Size()
	if info.Mode()&0o100 != 0 {
		h.Mode = 0o755
	}
	if err := t.WriteHeader(h); err != nil {
		return err
	}
	if _, err := io.Copy(t, fileio.Until(ctx, f)); err != nil {
		return fault.Wrap(fault.KindOf(err), err, "cannot pack %s", e.Path)
	}
	return nil
}
