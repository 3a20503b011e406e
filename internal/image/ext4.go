package image

import (
	"context"
	"errors"
	"path/filepath"

	"banger/internal/disk"
	"banger/internal/fault"
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
		return b.explainExt4(ctx, err)
	}
	m.Skipped = append(m.Skipped, "the content of /root: it stays in the image, below the VM's own /root")
	return nil
}

// explainExt4 tells of what people gave us, and not of our copy of it, which is gone by then.
func (b *importing) explainExt4(ctx context.Context, err error) error {
	hint := fault.HintOf(err)
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, disk.ErrDamaged):
		hint = "repair it, or a copy of it, with: e2fsck -f " + b.source.path
	case hint == "":
		hint = "make a tar of what is in it, and import that"
	}
	return fault.Wrap(fault.Precondition, err, "the file system in %s cannot be taken over", b.source.path).WithHint("%s", hint)
}
