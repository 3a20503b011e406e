package capability

import (
	"context"
	"path/filepath"

	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

var (
	_ Shaper = (*rootDisk)(nil)
	_ Shaper = (*workDisk)(nil)
	_ Shaper = (*modules)(nil)
	_ Shaper = (*network)(nil)
	_ Shaper = (*agent)(nil)
)

// Shape tells what the guest boots with beside its identity: the initramfs is named by its content, the agent
// inside. The initramfs is made when it is not there.
func (c *agent) Shape(ctx context.Context, v vm.VM, caps vmm.Caps, s *template.Shape) error {
	img, err := c.o.image(ctx, v)
	if err != nil {
		return err
	}
	k, err := c.o.Kernels.Get(ctx, v.Spec.Kernel)
	if err != nil {
		return err
	}
	var extra []string
	if caps.Channel == "vsock" {
		extra = []string{"vmw_vsock_virtio_transport"}
	}
	base, _, err := c.o.Kernels.Initramfs(ctx, k, c.o.AgentBinary, extra...)
	if err != nil {
		return err
	}
	s.Initramfs = filepath.Base(base)
	s.Units, s.MaskedUnits, s.PlainDirs = string(v.Spec.Units), masks(v.Spec.Units, img), plainDirs
	if v.Spec.Units != vm.UnitsStock {
		s.Cmdline = fastArgs
	}
	return nil
}
