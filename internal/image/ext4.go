package image

import (
	"context"
	"path/filepath"

	"banger/internal/disk"
)

// importExt4 takes over a file system as it is: repaired where that is safe, without a journal, and shrunk to what is
// in it. Nothing of it can be moved to a work seed without mounting it, so a VM of it begins with an empty /root.
func (b *importing) importExt4(ctx context.Context, m *Manifest) error {
	root := filepath.Join(b.dir, rootName)
	b.sink.Update(StageImport, "copying the file system", 0.1)
	if err := disk.CloneFile(ctx, root, b.source.path); err != nil {
		return err
	}
	b.sink.Update(StageImport, "checking and shrinking the file system", 0.5)
	if err := disk.CompactExt4(ctx, root); err != nil {
		return err
	}
	m.Skipped = append(m.Skipped, "the content of /root: it stays in the image, below the VM's own /root")
	return nil
}
