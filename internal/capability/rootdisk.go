package capability

import (
	"context"
	"encoding/json"
	"os"
	"path/filepath"

	agentv1 "banger/api/agent/v1"
	"banger/internal/disk"
	"banger/internal/paths"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// rootDisk is the image's read-only root file system with the VM's own overlay above it.
type rootDisk struct{ o Options }

type rootNote struct {
	Image  string `json:"image"`  // its name when the overlay was made: the default may become another one
	Digest string `json:"digest"` // of the image at the last start
}

const rootDiskName = "root-disk"

func (*rootDisk) Name() string       { return rootDiskName }
func (*rootDisk) Wants(vm.Spec) bool { return true }

func (c *rootDisk) overlay(v vm.VM) string {
	return filepath.Join(c.o.Paths.VM(v.ID), paths.OverlayDisk)
}

func (c *rootDisk) Check(ctx context.Context, v vm.VM) error {
	note, err := c.note(v)
	if err != nil {
		return err
	}
	if _, err := c.o.image(ctx, v); err != nil {
		return err
	}
	_, err = os.Stat(c.overlay(v))
	switch {
	case err == nil:
		return nil
	case note.Digest != "":
		return missing("overlay disk", c.overlay(v), v)
	}
	return checkSpace("disk", v.Spec.DiskBytes, c.o.Paths.VMs())
}

func (c *rootDisk) note(v vm.VM) (rootNote, error) {
	note := rootNote{Image: v.Spec.Image}
	return note, readNote(v, c.Name(), &note)
}

func (c *rootDisk) Up(ctx context.Context, v vm.VM, b *Build) (Note, error) {
	note, err := c.note(v)
	if err != nil {
		return nil, err
	}
	img, err := c.o.image(ctx, v)
	if err != nil {
		return nil, err
	}
	if b.Restored && note.Digest != "" && note.Digest != img.Digest {
		return nil, changed("image "+img.Name, v)
	}
	overlay := filepath.Join(b.Machine.Dir, paths.OverlayDisk)
	_, err = os.Stat(overlay)
	switch {
	case err != nil && note.Digest != "":
		return nil, missing("overlay disk", overlay, v)
	case b.Template != "":
		err = cloneGrown(ctx, overlay, filepath.Join(b.Template, paths.OverlayDisk), v.Spec.DiskBytes)
	case err != nil:
		err = disk.CloneSeed(ctx, c.o.Paths.Seeds(), overlay, v.Spec.DiskBytes, "overlay")
	}
	if err != nil {
		return nil, err
	}
	b.addDisk(agentv1.Disk_ROLE_ROOT, vmm.Disk{Role: "root", Path: img.Root, ReadOnly: true})
	b.addDisk(agentv1.Disk_ROLE_OVERLAY, vmm.Disk{Role: "overlay", Path: paths.OverlayDisk})
	return json.Marshal(rootNote{Image: img.Name, Digest: img.Digest})
}

// Shape tells which image it is.
func (c *rootDisk) Shape(ctx context.Context, v vm.VM, _ vmm.Caps, s *template.Shape) error {
	img, err := c.o.image(ctx, v)
	s.Image, s.ImageDigest, s.DiskBytes = img.Name, img.Digest, v.Spec.DiskBytes
	return err
}

// cloneGrown clones a disk of a template and makes it larger. The file system in it is mounted by the guest that
// goes on with it, and only that guest may grow it.
func cloneGrown(ctx context.Context, dst, src string, size int64) error {
	if err := disk.CloneFile(ctx, dst, src); err != nil {
		return err
	}
	info, err := os.Stat(dst)
	if err != nil || info.Size() >= size {
		return err
	}
	return os.Truncate(dst, size)
}

// Down has nothing to take back: the overlay outlives a stop.
func (*rootDisk) Down(context.Context, vm.VM) error { return nil }

// addDisk adds a disk for the VMM and, at the same place, for the guest.
func (b *Build) addDisk(role agentv1.Disk_Role, d vmm.Disk) {
	b.Machine.Disks = append(b.Machine.Disks, d)
	b.Guest.Disks = append(b.Guest.Disks, &agentv1.Disk{Role: role, ReadOnly: d.ReadOnly})
}

// Inherits: a copy of the VM knows which image the overlay is for.
func (*rootDisk) Inherits() {}
