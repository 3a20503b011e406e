// Package kernel makes and keeps guest kernels: the boot image, the same as ELF, the modules as a
// disk of their own, and the initramfs that starts the agent. A kernel is independent of the
// images that run on it.
package kernel

import (
	"context"
	"path/filepath"
	"sync"
	"time"

	"banger/internal/artifact"
	"banger/internal/fault"
)

// Files of a kernel's directory.
const (
	manifestName = "kernel.json"
	bzImageName  = "vmlinuz"
	elfName      = "vmlinux"
	modulesName  = "modules.ext4"
	bootName     = "boot-modules.cpio"
	configName   = "config"
)

// Manifest is the content of kernel.json.
type Manifest struct {
	Name         string          `json:"name"`
	Release      string          `json:"release"` // as uname -r says
	Architecture string          `json:"architecture"`
	Package      string          `json:"package"`
	Version      string          `json:"version"`
	Source       string          `json:"source,omitempty"` // name of the file it was imported from
	Files        []artifact.File `json:"files"`
	BootModules  []BootModule    `json:"boot_modules"`
	CreatedAt    time.Time       `json:"created_at"`
}

// BootModule is a module that an initramfs can carry.
type BootModule struct {
	Name  string   `json:"name"`
	Paths []string `json:"paths"` // what to load, in order, itself last; below /lib/modules
}

// Kernel is a kernel ready for use. All paths are absolute.
type Kernel struct {
	Name         string
	Release      string // as uname -r says
	Architecture string
	Dir          string
	BzImage      string // the boot image as shipped: bzImage on amd64, Image on arm64; empty: there is none
	ELF          string // vmlinux with its PVH note on amd64; equal to BzImage on arm64
	ModulesDisk  string // read-only ext4 for /lib/modules/<Release>; empty: all is built in
	Bytes        int64  // of all its files
	Manifest     Manifest
	CreatedAt    time.Time
	Problem      string // why it cannot be used; only List returns such kernels
}

// Store holds kernels in a directory.
type Store struct {
	shelf *artifact.Shelf
	cache string

	mu     sync.Mutex
	agents map[string]summed // by path
}

// Open returns the store in dir, which need not be there yet. cacheDir holds what can be made again.
func Open(dir, cacheDir string) *Store {
	return &Store{shelf: artifact.Open(dir, "kernel", manifestName), cache: cacheDir, agents: map[string]summed{}}
}

// List returns all kernels, sorted by name, also those with a Problem.
func (s *Store) List(ctx context.Context) ([]Kernel, error) {
	names, err := s.shelf.Names()
	if err != nil {
		return nil, err
	}
	var kernels []Kernel
	for _, name := range names {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		k, err := s.load(name)
		if err != nil {
			k.Name, k.Dir, k.Problem = name, s.shelf.Dir(name), artifact.Problem(err)
		}
		kernels = append(kernels, k)
	}
	return kernels, nil
}

// Get returns a kernel whose files are all there and unchanged; name "" is the default one. An
// unknown name is a NotFound fault, a damaged kernel a Precondition fault.
func (s *Store) Get(ctx context.Context, name string) (Kernel, error) {
	if err := ctx.Err(); err != nil {
		return Kernel{}, err
	}
	asked := name
	if name == "" {
		var err error
		if name, err = s.shelf.Default(); err != nil {
			return Kernel{}, err
		}
	}
	if name == "" || !s.shelf.Has(name) {
		return Kernel{}, s.shelf.Missing(asked)
	}
	return s.load(name)
}

// Verify sums the whole content of a kernel's files.
func (s *Store) Verify(ctx context.Context, name string) error {
	k, err := s.Get(ctx, name)
	if err != nil {
		return err
	}
	return s.shelf.Verify(ctx, k.Name, k.Manifest.Files)
}

func (s *Store) load(name string) (Kernel, error) {
	var m Manifest
	if err := s.shelf.ReadManifest(name, &m); err != nil {
		return Kernel{}, err
	}
	dir := s.shelf.Dir(name)
	k := Kernel{
		Name: name, Release: m.Release, Architecture: m.Architecture, Dir: dir, Manifest: m, CreatedAt: m.CreatedAt,
	}
	for _, f := range m.Files {
		k.Bytes += f.Size
		switch path := filepath.Join(dir, f.Name); f.Name {
		case bzImageName:
			k.BzImage = path
		case elfName:
			k.ELF = path
		case modulesName:
			k.ModulesDisk = path
		}
	}
	if m.Architecture != "amd64" {
		k.ELF = k.BzImage
	}
	if m.Name != name || m.Release == "" {
		return Kernel{}, fault.New(fault.Precondition, "kernel %s is damaged: its manifest tells of another one", name).
			WithHint("make it again with: banger setup --rebuild")
	}
	return k, s.shelf.Check(name, m.Files)
}
