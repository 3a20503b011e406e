package kernel

import (
	"context"
	"os"
	"path/filepath"

	"banger/internal/disk"
	"banger/internal/progress"
)

// FromBundle takes the kernel whose boot image is file into the catalogue, with all that lies ready beside it, and makes it the
// default. A boot image without a manifest beside it is imported as any other.
func (s *Store) FromBundle(ctx context.Context, file string, sink progress.Sink) (k Kernel, err error) {
	from := filepath.Dir(file)
	if _, err := os.Stat(filepath.Join(from, manifestName)); err != nil {
		if k, err = s.Import(ctx, ImportOptions{Source: file}, sink); err != nil {
			return k, err
		}
		return s.SetDefault(ctx, k.Name)
	}
	err = sink.Run(Stage, func() error {
		name, err := s.shelf.Adopt(ctx, from, disk.CloneFile)
		if err == nil {
			k, err = s.SetDefault(ctx, name)
		}
		return err
	})
	return k, err
}
