package capability

import (
	"context"
	"errors"
	"net/netip"
	"os"
	"path/filepath"
	"testing"

	agentv1 "banger/api/agent/v1"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/hosttest/need"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/paths"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// shelf is the images and kernels of a test.
type shelf struct {
	images map[string]image.Image
	kernel kernel.Kernel
	base   string
	fail   error
}

func (s *shelf) Get(_ context.Context, name string) (image.Image, error) {
	if name == "" {
		name = "default"
	}
	img, ok := s.images[name]
	if !ok {
		return image.Image{}, fault.New(fault.NotFound, "no image named %s", name)
	}
	return img, s.fail
}

type kernels struct{ *shelf }

func (k kernels) Get(context.Context, string) (kernel.Kernel, error) { return k.kernel, k.fail }

func (k kernels) Initramfs(_ context.Context, _ kernel.Kernel, _ string, extra ...string) (string, []string, error) {
	return k.base, append([]string{"virtio_blk.ko"}, extra...), k.fail
}

// fixture is a host with one image, one kernel and a network of memory.
type fixture struct {
	Options

	shelf *shelf
	net   *hostnet.Fake
	all   []Capability
}

const seedSize = 64 << 20

func newFixture(t *testing.T) *fixture {
	t.Helper()
	need.Binary(t, "mke2fs")
	p := paths.Under(t.TempDir())
	if err := p.Make(); err != nil {
		t.Fatal(err)
	}
	file := func(name string) string {
		path := filepath.Join(p.Cache, name)
		if err := os.WriteFile(path, []byte(name), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	seed := filepath.Join(p.Cache, "seed.ext4")
	if err := disk.CreateExt4(t.Context(), seed, seedSize, "work"); err != nil {
		t.Fatal(err)
	}
	img := image.Image{Name: "debian-1", Digest: "sha256:1", Root: file("root"), WorkSeed: seed, WorkSeedBytes: seedSize}
	s := &shelf{
		images: map[string]image.Image{"default": img, "debian-1": img}, base: file("base"),
		kernel: kernel.Kernel{Name: "k", BzImage: file("vmlinuz"), ELF: file("vmlinux"), ModulesDisk: file("modules")},
	}
	f := &fixture{shelf: s, net: hostnet.NewFake(), Options: Options{
		Paths: p, Images: s, Kernels: kernels{s}, AgentBinary: file("agent"),
		Nameservers: func() []netip.Addr { return []netip.Addr{netip.MustParseAddr("9.9.9.9")} },
	}}
	f.Network = f.net
	f.all = All(f.Options)
	return f
}

func (f *fixture) vm(t *testing.T, id vm.ID, name string) vm.VM {
	t.Helper()
	if err := os.MkdirAll(f.Paths.VM(id), 0o700); err != nil {
		t.Fatal(err)
	}
	return vm.VM{ID: id, MAC: hostnet.MAC(id), IP: netip.MustParseAddr("172.30.0.2"), Notes: map[string]Note{}, Spec: vm.Spec{
		Name: name, CPUs: 1, MemoryBytes: 1 << 30, DiskBytes: 64 << 20, WorkDiskBytes: seedSize, NAT: true, Units: vm.UnitsFast,
	}}
}

func (f *fixture) build(v vm.VM) *Build {
	return &Build{
		Machine: &vmm.Machine{ID: v.ID, Name: v.Spec.Name, Dir: f.Paths.VM(v.ID)}, Guest: &agentv1.GuestConfig{},
		Caps: vmm.Caps{KernelFormats: []string{"elf", "bzimage"}, Channel: "virtio-serial"},
	}
}

func (f *fixture) check(ctx context.Context, v vm.VM) error {
	var errs []error
	for _, c := range f.all {
		errs = append(errs, c.Check(ctx, v))
	}
	return errors.Join(errs...)
}

// up brings all up as the engine does, notes included.
func (f *fixture) up(ctx context.Context, v *vm.VM) (*Build, error) {
	b := f.build(*v)
	for _, c := range f.all {
		note, err := c.Up(ctx, *v, b)
		if err != nil {
			return nil, err
		}
		if note != nil {
			v.Notes[c.Name()] = note
		}
	}
	return b, nil
}

func (f *fixture) down(ctx context.Context, v vm.VM) error {
	var errs []error
	for _, c := range f.all {
		errs = append(errs, c.Down(ctx, v))
	}
	return errors.Join(errs...)
}

func mustAddr(s string) netip.Addr { return netip.MustParseAddr(s) }
