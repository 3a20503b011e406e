package image

import (
	"context"
	"os"
	"path/filepath"

	"banger/internal/disk"
	"banger/internal/progress"
)

// FromBundle takes the image whose root file system is file into the catalogue, with all that lies ready beside it, and makes it
// the default. A root file system without a manifest beside it is imported as any other.
func (s *Store) FromBundle(ctx context.Context, file string, sink progress.Sink) (i Image, err error) {
	from := filepath.Dir(file)
	if _, err := os.Stat(filepath.Join(from, manifestName)); err != nil {
		if i, err = s.Import(ctx, ImportOptions{Source: file}, sink); err != nil {
			return i, err
		}
		return s.SetDefault(ctx, i.Name)
	}
	err = sink.Run(Stage, func() error {
		name, err := s.shelf.Adopt(ctx, from, disk.CloneFile)
		if err == nil {
			i, err = s.SetDefault(ctx, name)
		}
		return err
	})
	return i, err
}
