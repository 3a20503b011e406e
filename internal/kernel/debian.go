package kernel

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"banger/internal/artifact"
	"banger/internal/debian"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/progress"
	"banger/internal/system"
)

// Stage is the name of the stage that FromDebian reports.
const Stage = "kernel"

// Space in bytes that must be free before it begins: for the package lists and the package in the cache, for
// the unpacked and the finished files in the store.
const (
	fetchSpace  = 150 << 20
	kernelSpace = 250 << 20
)

// DebianOptions says which of Debian's kernels to take; it is for this machine's architecture.
type DebianOptions struct {
	Mirror  string // URL; empty: Debian's own
	Suite   string // release; empty: stable
	Rebuild bool   // also when the default kernel is there already
}

// FromDebian fetches Debian's kernel for virtual machines, makes what banger needs of it, and makes
// it the default. With a sound default kernel in place it returns that one at once, unless told to
// rebuild. It needs no root right, and what an interrupted run fetched is not fetched again.
func (s *Store) FromDebian(ctx context.Context, o DebianOptions, sink progress.Sink) (k Kernel, err error) {
	if k, err := s.Get(ctx, ""); err == nil && !o.Rebuild {
		return k, nil
	}
	err = sink.Run(Stage, func() error {
		k, err = s.fromDebian(ctx, o, sink)
		return err
	})
	return k, err
}

func (s *Store) fromDebian(ctx context.Context, o DebianOptions, sink progress.Sink) (Kernel, error) {
	source := debian.Source{Mirror: o.Mirror, Suite: o.Suite}.WithDefaults(runtime.GOARCH)
	if _, err := findDepmod(); err != nil { // before anything is fetched
		return Kernel{}, err
	}
	if err := os.MkdirAll(s.cache, 0o700); err != nil {
		return Kernel{}, fault.Wrap(fault.Precondition, err, "cannot make directory %s", s.cache)
	}
	if err := disk.RequireFree(s.cache, fetchSpace, "fetching a kernel"); err != nil {
		return Kernel{}, err
	}
	p, deb, err := s.fetch(ctx, source, sink)
	if err != nil {
		return Kernel{}, err
	}
	name, err := s.shelf.Build(func(dir string) (string, any, error) {
		if err := disk.RequireFree(filepath.Dir(dir), kernelSpace, "a kernel"); err != nil {
			return "", nil, err
		}
		m, err := makeKernel(ctx, dir, source, p, deb, sink)
		return m.Name, m, err
	})
	if err != nil {
		return Kernel{}, err
	}
	if err := s.shelf.SetDefault(name); err != nil {
		return Kernel{}, err
	}
	return s.Get(ctx, name)
}

func (s *Store) fetch(ctx context.Context, source debian.Source, sink progress.Sink) (debian.Package, string, error) {
	var none debian.Package
	apt, err := debian.OpenApt(ctx, filepath.Join(s.cache, "apt-"+source.Suite+"-"+source.Architecture), source)
	if err != nil {
		return none, "", err
	}
	sink.Update(Stage, "reading Debian's package lists", 0)
	if err := apt.Update(ctx); err != nil {
		return none, "", err
	}
	p, err := concretePackage(ctx, apt, "linux-image-cloud-"+source.Architecture)
	if err != nil {
		return none, "", err
	}
	sink.Update(Stage, fmt.Sprintf("fetching %s (%d MB)", p.Name, p.Size/1_000_000), 0.1)
	deb, err := apt.Download(ctx, p)
	if err != nil {
		return none, "", err
	}
	return p, deb, apt.Forget(deb)
}

// concretePackage finds the package with the kernel behind the one that always names the newest.
func concretePackage(ctx context.Context, apt *debian.Apt, meta string) (debian.Package, error) {
	p, err := apt.Show(ctx, meta)
	if err != nil {
		return p, err
	}
	for _, d := range p.Depends {
		if strings.HasPrefix(d, "linux-image-") {
			return apt.Show(ctx, d)
		}
	}
	return p, nil
}

// makeKernel makes the files of a kernel of a package in dir.
func makeKernel(ctx context.Context, dir string, source debian.Source, p debian.Package, deb string, sink progress.Sink) (Manifest, error) {
	m := Manifest{Architecture: source.Architecture, Package: p.Name, Version: p.Version, CreatedAt: time.Now().UTC()}
	err := kernelOfPackage(ctx, dir, deb, &m, sink)
	m.Name = m.Release
	return m, err
}

// kernelOfPackage unpacks a package into dir and makes the files of a kernel there.
func kernelOfPackage(ctx context.Context, dir, deb string, m *Manifest, sink progress.Sink) error {
	work := filepath.Join(dir, "work")
	sink.Update(Stage, "unpacking "+m.Package, 0.4)
	release, err := unpackPackage(ctx, deb, dir, work)
	if err != nil {
		return err
	}
	m.Release = release
	tree := filepath.Join(work, "lib/modules", release)
	sink.Update(Stage, "preparing modules", 0.8)
	if err := runDepmod(ctx, work, release); err != nil {
		return err
	}
	if err := writeModulesDisk(ctx, tree, filepath.Join(dir, modulesName)); err != nil {
		return err
	}
	if m.BootModules, err = writeBootModules(tree, release, filepath.Join(dir, bootName)); err != nil {
		return err
	}
	files := []string{bzImageName, modulesName, bootName, configName}
	if m.Architecture == "amd64" {
		sink.Update(Stage, "extracting vmlinux", 0.9)
		if err := writeELF(ctx, dir); err != nil {
			return err
		}
		files = append(files, elfName)
	}
	if err := os.RemoveAll(work); err != nil {
		return err
	}
	m.Files, err = artifact.Describe(dir, files...)
	return err
}

func writeELF(ctx context.Context, dir string) error {
	image, err := os.ReadFile(filepath.Join(dir, bzImageName))
	if err != nil {
		return err
	}
	vmlinux, err := extractELF(ctx, image)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(dir, elfName), vmlinux, 0o600)
}

// unpackPackage writes the boot image and the configuration to dir, and the modules below work as
// lib/modules/<release>. It returns the release.
func unpackPackage(ctx context.Context, deb, dir, work string) (release string, err error) {
	if err := os.MkdirAll(work, 0o700); err != nil {
		return "", err
	}
	root, err := os.OpenRoot(work)
	if err != nil {
		return "", err
	}
	defer func() { _ = root.Close() }()
	err = debian.WalkDeb(ctx, deb, func(h *tar.Header, content io.Reader) error {
		if h.Typeflag != tar.TypeReg {
			return nil
		}
		name := strings.TrimPrefix(h.Name, "usr/")
		if r, ok := strings.CutPrefix(name, "boot/vmlinuz-"); ok {
			release = r
			return writeFile(filepath.Join(dir, bzImageName), content)
		}
		if strings.HasPrefix(name, "boot/config-") {
			return writeFile(filepath.Join(dir, configName), content)
		}
		if strings.HasPrefix(name, "lib/modules/") {
			return unpackInto(root, name, content)
		}
		return nil
	})
	if err != nil {
		return "", err
	}
	if release == "" || strings.ContainsAny(release, "/ ") || strings.HasPrefix(release, ".") {
		return "", fault.New(fault.Precondition, "package %s holds no kernel", filepath.Base(deb))
	}
	return release, nil
}

func writeFile(name string, content io.Reader) error {
	f, err := os.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	return errors.Join(err, f.Close())
}

func unpackInto(root *os.Root, name string, content io.Reader) error {
	if err := root.MkdirAll(path.Dir(name), 0o755); err != nil {
		return err
	}
	f, err := root.OpenFile(name, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o644)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, content)
	return errors.Join(err, f.Close())
}

func findDepmod() (string, error) { return system.Find("depmod", "kmod") }

// runDepmod makes modules.dep and the indexes that the guest's modprobe reads; Debian's package
// leaves that to its installation.
func runDepmod(ctx context.Context, base, release string) error {
	depmod, err := findDepmod()
	if err != nil {
		return err
	}
	_, err = system.Run(ctx, system.Command{Path: depmod, Args: []string{"-b", base, release}})
	return err
}

// writeModulesDisk writes the tree of one release as a read-only file system.
func writeModulesDisk(ctx context.Context, tree, out string) (err error) {
	f, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	r, w := io.Pipe()
	go func() { w.CloseWithError(tarTree(w, tree)) }()
	defer func() { _ = r.Close() }()
	return disk.WriteExt4(ctx, r, f)
}

// tarTree writes the directories and regular files below dir, all owned by root. Where a file system of their own is mounted,
// as in banger's guests, what is lost and found there does not belong to it.
func tarTree(out io.Writer, dir string) error {
	w := tar.NewWriter(out)
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		rel, relErr := filepath.Rel(dir, name)
		switch {
		case relErr != nil:
			return relErr
		case rel == "lost+found" && d.IsDir():
			return filepath.SkipDir
		case errors.Is(err, fs.ErrPermission):
			return fault.Wrap(fault.Precondition, err, "the kernel's modules may not be read").WithHint("copy them to where you may read all of them")
		case err != nil:
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		h := &tar.Header{Name: filepath.ToSlash(rel), ModTime: info.ModTime(), Mode: 0o644, Typeflag: tar.TypeReg, Size: info.Size()}
		if d.IsDir() {
			h.Typeflag, h.Mode, h.Size = tar.TypeDir, 0o755, 0
			h.Name += "/"
			return w.WriteHeader(h)
		}
		if !d.Type().IsRegular() {
			return nil
		}
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		f, err := os.Open(name)
		if err != nil {
			return err
		}
		_, err = io.Copy(w, f)
		return errors.Join(err, f.Close())
	})
	return errors.Join(err, w.Close())
}

// writeBootModules writes the modules that an initramfs may need, decompressed, as a cpio archive.
func writeBootModules(tree, release, out string) ([]BootModule, error) {
	deps, compiledIn, err := readIndexes(tree)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fault.Wrap(fault.Precondition, err, "the modules of kernel %s are not whole", release).
			WithHint("take them as the kernel's make modules_install, or its package, puts them")
	}
	if err != nil {
		return nil, err
	}
	f, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	w := newArchive(f)
	var modules []BootModule
	for _, name := range append(slices.Clone(bootModules), optionalModules...) {
		m := BootModule{Name: name}
		for _, file := range deps.closure(name) {
			m.Paths = append(m.Paths, path.Join(release, unpackedName(file)))
			if err := putModule(w, tree, release, file); err != nil {
				return nil, err
			}
		}
		if len(m.Paths) == 0 && !compiledIn[name] {
			if name == "virtio_mmio" || slices.Contains(optionalModules, name) {
				continue
			}
			return nil, fault.New(fault.Precondition, "kernel %s has no %s", release, name).
				WithHint("take a kernel that is made for virtual machines")
		}
		modules = append(modules, m)
	}
	return modules, w.close()
}

func readIndexes(tree string) (dependencies, map[string]bool, error) {
	dep, err := os.Open(filepath.Join(tree, "modules.dep"))
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = dep.Close() }()
	deps, err := parseDependencies(dep)
	if err != nil {
		return nil, nil, err
	}
	list, err := os.Open(filepath.Join(tree, "modules.builtin"))
	if err != nil {
		return nil, nil, err
	}
	defer func() { _ = list.Close() }()
	compiledIn, err := builtIn(list)
	return deps, compiledIn, err
}

// putModule adds one decompressed module, once.
func putModule(w *archiveWriter, tree, release, file string) error {
	name := path.Join("lib/modules", release, unpackedName(file))
	if w.made[name] {
		return nil
	}
	w.made[name] = true
	f, err := os.Open(filepath.Join(tree, file))
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	r, err := debian.Decompress(f)
	if err != nil {
		return err
	}
	defer func() { _ = r.Close() }()
	content, err := readBounded(r)
	if err != nil {
		return fmt.Errorf("module %s: %w", file, err)
	}
	w.putFile(name, 0o644, int64(len(content)), strings.NewReader(string(content)))
	return w.err
}
