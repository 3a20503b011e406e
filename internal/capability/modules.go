package capability

import (
	"context"
	"encoding/json"
	"slices"

	agentv1 "banger/api/agent/v1"
	"banger/internal/artifact"
	"banger/internal/fault"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// modules is the guest's kernel with the disk of its modules.
type modules struct{ o Options }

type modulesNote struct {
	Digest string `json:"digest"` // of the kernel at the last start
}

func (*modules) Name() string       { return "modules" }
func (*modules) Wants(vm.Spec) bool { return true }

func (c *modules) Check(ctx context.Context, v vm.VM) error {
	_, err := c.o.Kernels.Get(ctx, v.Spec.Kernel)
	return err
}

func (c *modules) Up(ctx context.Context, v vm.VM, b *Build) (Note, error) {
	k, err := c.o.Kernels.Get(ctx, v.Spec.Kernel)
	if err != nil {
		return nil, err
	}
	var note modulesNote
	if err := readNote(v, c.Name(), &note); err != nil {
		return nil, err
	}
	digest := artifact.Digest(k.Manifest.Files)
	if b.Restored && note.Digest != "" && note.Digest != digest {
		return nil, changed("kernel "+k.Name, v)
	}
	files := map[string]string{"elf": k.ELF, "bzimage": k.BzImage, "image": k.BzImage}
	i := slices.IndexFunc(b.Caps.KernelFormats, func(format string) bool { return files[format] != "" })
	if i < 0 {
		return nil, fault.New(fault.Precondition, "kernel %s has none of the formats this VMM boots: %v", k.Name, b.Caps.KernelFormats).
			WithHint("make it again: banger setup --rebuild")
	}
	b.Machine.Kernel = files[b.Caps.KernelFormats[i]]
	if k.ModulesDisk != "" { // else it has all built in
		b.addDisk(agentv1.Disk_ROLE_MODULES, vmm.Disk{Role: "modules", Path: k.ModulesDisk, ReadOnly: true})
	}
	return json.Marshal(modulesNote{Digest: digest})
}

// Shape tells which kernel it is.
func (c *modules) Shape(ctx context.Context, v vm.VM, _ vmm.Caps, s *template.Shape) error {
	k, err := c.o.Kernels.Get(ctx, v.Spec.Kernel)
	s.Kernel, s.KernelDigest = k.Name, artifact.Digest(k.Manifest.Files)
	return err
}

// Down has nothing to take back.
func (*modules) Down(context.Context, vm.VM) error { return nil }

// Inherits: a copy of the VM knows which kernel is in the memory.
func (*modules) Inherits() {}
