package capability

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"

	agentv1 "banger/api/agent/v1"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/image"
	"banger/internal/paths"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// workDisk is the VM's /root, cloned once from the image's work seed.
type workDisk struct{ o Options }

type workNote struct {
	Made bool `json:"made"`
}

func (*workDisk) Name() string       { return "work-disk" }
func (*workDisk) Wants(vm.Spec) bool { return true }

func (c *workDisk) file(v vm.VM) string { return filepath.Join(c.o.Paths.VM(v.ID), paths.WorkDisk) }

func (c *workDisk) Check(ctx context.Context, v vm.VM) error {
	var note workNote
	if err := readNote(v, c.Name(), &note); err != nil {
		return err
	}
	if _, err := os.Stat(c.file(v)); err == nil {
		return nil
	}
	if note.Made {
		return missing("work disk", c.file(v), v)
	}
	img, err := c.o.image(ctx, v)
	if err != nil {
		return err
	}
	if img.WorkSeed != "" && v.Spec.WorkDiskBytes < img.WorkSeedBytes {
		return fault.New(fault.Usage, "a work disk of %s is smaller than the work seed of image %s", vm.FormatSize(v.Spec.WorkDiskBytes), img.Name).
			WithHint("use at least %s", vm.FormatSize(img.WorkSeedBytes))
	}
	return checkSpace("work disk", v.Spec.WorkDiskBytes, c.o.Paths.VMs())
}

func (c *workDisk) Up(ctx context.Context, v vm.VM, b *Build) (Note, error) {
	var note workNote
	if err := readNote(v, c.Name(), &note); err != nil {
		return nil, err
	}
	file := filepath.Join(b.Machine.Dir, paths.WorkDisk)
	_, err := os.Stat(file)
	switch {
	case err != nil && note.Made:
		return nil, missing("work disk", file, v)
	case b.Template != "":
		err = cloneGrown(ctx, file, filepath.Join(b.Template, paths.WorkDisk), v.Spec.WorkDiskBytes)
	case !note.Made:
		err = c.make(ctx, v, file, err == nil)
	}
	if err != nil {
		return nil, err
	}
	b.addDisk(agentv1.Disk_ROLE_WORK, vmm.Disk{Role: "work", Path: paths.WorkDisk})
	return json.Marshal(workNote{Made: true})
}

// make clones the disk, unless that was done before a death, and grows it.
func (c *workDisk) make(ctx context.Context, v vm.VM, file string, cloned bool) error {
	img, err := c.o.image(ctx, v)
	if err != nil {
		return err
	}
	if !cloned {
		if err := c.clone(ctx, v, file, img); err != nil {
			return err
		}
	}
	if err := disk.GrowExt4(ctx, file, v.Spec.WorkDiskBytes); err != nil {
		return errors.Join(err, os.Remove(file))
	}
	return nil
}

func (c *workDisk) clone(ctx context.Context, v vm.VM, file string, img image.Image) error {
	if img.WorkSeed == "" { // an image that keeps nothing in /root
		return disk.CloneSeed(ctx, c.o.Paths.Seeds(), file, v.Spec.WorkDiskBytes, "work")
	}
	return disk.CloneFile(ctx, file, img.WorkSeed)
}

// Shape tells how large it is; what is on it comes with the image.
func (*workDisk) Shape(_ context.Context, v vm.VM, _ vmm.Caps, s *template.Shape) error {
	s.WorkDiskBytes = v.Spec.WorkDiskBytes
	return nil
}

// Down has nothing to take back: the work outlives a stop.
func (*workDisk) Down(context.Context, vm.VM) error { return nil }

// Inherits: a copy of the VM knows that there is one.
func (*workDisk) Inherits() {}
