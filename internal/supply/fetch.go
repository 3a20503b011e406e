package supply

import (
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"banger/internal/archive"
	"banger/internal/artifact"
	"banger/internal/bundle"
	"banger/internal/download"
	"banger/internal/fault"
	"banger/internal/fileio"
)

const partBundle = "bundle"

// Fetch puts a bundle into the runtime directory. One that is there already, and whole, is left alone: then again is true.
// The errors are those of download.File and archive.Unpack, and Precondition for a bundle whose content is not what it says.
func (s *Store) Fetch(ctx context.Context, from Listed) (b bundle.Bundle, again bool, err error) {
	if b, err := bundle.Read(s.Dir); err == nil && has(b, partBundle, from.SHA256) {
		if problems, err := Verify(ctx, b); err == nil && len(problems) == 0 {
			return b, true, nil
		}
	}
	file, done, err := s.obtain(ctx, from.URL, from.SHA256)
	if err != nil {
		return b, false, err
	}
	b, err = s.change(func(dir string) (change, error) {
		err := s.Sink.Run(stageUnpack, func() error { return unpackFile(ctx, file, dir, archive.Limits{}) })
		if err != nil {
			return change{}, err
		}
		var c change
		err = s.Sink.Run(stageVerify, func() (err error) {
			c, err = examine(ctx, dir)
			return err
		})
		c.label = from.SHA256[:12]
		c.source = bundle.Source{Part: partBundle, Version: c.manifest.Version, URL: from.URL, SHA256: from.SHA256, Manifest: from.Listing}
		return c, err
	})
	if err == nil {
		done()
	}
	return b, false, err
}

func has(b bundle.Bundle, part, sum string) bool {
	for _, s := range b.Manifest.Sources {
		if s.Part == part {
			return s.SHA256 == sum
		}
	}
	return false
}

// obtain returns a file with the right checksum: the one at a path, or a download. done removes a download.
func (s *Store) obtain(ctx context.Context, address, sum string) (file string, done func(), err error) {
	if err := s.writable(); err != nil {
		return "", nil, err
	}
	if !strings.Contains(address, "://") {
		return address, func() {}, s.Sink.Run(stageVerify, func() error { return checkFile(address, sum) })
	}
	err = s.Sink.Run(stageDownload, func() error {
		file, err = download.File(ctx, address, download.Options{Dir: s.Downloads, SHA256: sum, Progress: s.downloaded})
		return err
	})
	return file, func() { _ = os.Remove(file) }, err
}

func (s *Store) downloaded(done, total int64) {
	if total <= 0 {
		s.Sink.Update(stageDownload, fmt.Sprintf("%d MB", done/1_000_000), -1)
		return
	}
	s.Sink.Update(stageDownload, fmt.Sprintf("%d of %d MB", done/1_000_000, total/1_000_000), float64(done)/float64(total))
}

func checkFile(path, sum string) error {
	if _, err := fileio.Plain(path); err != nil {
		return err
	}
	got, _, err := artifact.Sum(path)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot read the archive")
	}
	if got != sum {
		return fault.New(fault.Precondition, "%s is not what was expected: its checksum is %s instead of %s", path, got, sum).
			WithHint("it was changed, or damaged on its way; nothing of it was used")
	}
	return nil
}

func unpackFile(ctx context.Context, path, dir string, l archive.Limits) error {
	f, err := os.Open(path)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot read the archive")
	}
	defer func() { _ = f.Close() }()
	return archive.Unpack(ctx, io.Reader(f), dir, l)
}

// examine reads what was unpacked into dir. Its own list of files, when it has one, must be right; the list that is kept is made
// here, of all that is there.
func examine(ctx context.Context, dir string) (change, error) {
	b, err := bundle.Read(dir)
	if err != nil {
		return change{}, err
	}
	if b.Empty() {
		return change{}, fault.New(fault.Precondition, "there is no %s in the archive, and no file with a name that says what it is", bundle.ManifestName)
	}
	problems, err := Verify(ctx, b)
	if err != nil {
		return change{}, err
	}
	if len(problems) > 0 {
		return change{}, fault.New(fault.Precondition, "the bundle is not what it says: %s", strings.ReplaceAll(problems[0].Text, dir+string(filepath.Separator), ""))
	}
	m := b.Manifest
	if m.Files, err = describe(ctx, dir); err != nil {
		return change{}, err
	}
	return change{manifest: m}, nil
}
