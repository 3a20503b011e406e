package kernel

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/artifact"
	"banger/internal/debian"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/fileio"
	"banger/internal/progress"
)

// maxKernelFile bounds a kernel file; debug builds of vmlinux have some hundred megabytes.
const maxKernelFile = 1 << 30

// maxConfigFile bounds a kernel's configuration; Debian's has 300 kB.
const maxConfigFile = 16 << 20

// ImportOptions say what to import. All paths are absolute.
type ImportOptions struct {
	Source  string // a Debian package, or a kernel file; empty: the host's own kernel
	Release string // which of the host's; empty: the one that runs
	Modules string // directory of the modules of a kernel file; may be empty
	Config  string // its configuration; may be empty
	Name    string // of the new kernel; empty: its release
}

// Import makes a kernel of a Debian package, of a kernel file with or without modules, or of the host's own files in
// /boot and /lib/modules.
func (s *Store) Import(ctx context.Context, o ImportOptions, sink progress.Sink) (k Kernel, err error) {
	if err := o.check(); err != nil {
		return k, err
	}
	if o.Name != "" && s.shelf.Has(o.Name) {
		return k, taken(o.Name)
	}
	if o.Source == "" {
		if o, err = hostKernel(o, "/"); err != nil {
			return k, err
		}
	}
	err = sink.Run(Stage, func() error {
		k, err = s.importAs(ctx, o, sink)
		return err
	})
	return k, err
}

var goodName = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._+~-]{0,99}$`)

func (o ImportOptions) check() error {
	for _, path := range []string{o.Source, o.Modules, o.Config} {
		if path != "" && !filepath.IsAbs(path) {
			return fault.New(fault.Usage, "%s is no absolute path", path)
		}
	}
	switch {
	case o.Name != "" && (!goodName.MatchString(o.Name) || o.Name == "default"):
		return fault.New(fault.Usage, "%q cannot name a kernel", o.Name).WithHint("use letters, digits, dots, dashes and underscores")
	case o.Release != "" && (!goodName.MatchString(o.Release) || o.Source != ""):
		return fault.New(fault.Usage, "%q is no release of this host's kernels", o.Release)
	}
	return nil
}

func taken(name string) error {
	return fault.New(fault.Conflict, "there is a kernel %q already", name).
		WithHint("give another name with --name, or delete that one: banger kernel delete %s", name)
}

// hostKernel finds the files of a kernel of the host below root.
func hostKernel(o ImportOptions, root string) (ImportOptions, error) {
	if o.Release == "" {
		var u unix.Utsname
		if err := unix.Uname(&u); err != nil {
			return o, fault.Wrap(fault.Unexpected, err, "cannot tell which kernel runs")
		}
		o.Release = unix.ByteSliceToString(u.Release[:])
	}
	for _, pattern := range []string{"boot/vmlinuz-%s", "lib/modules/%s/vmlinuz", "boot/Image-%s", "boot/kernel-%s"} {
		path := filepath.Join(root, fmt.Sprintf(pattern, o.Release))
		if _, err := os.Stat(path); err == nil {
			o.Source = path
			break
		}
	}
	if o.Source == "" {
		return o, fault.New(fault.NotFound, "this host has no kernel %s in %s", o.Release, filepath.Join(root, "boot")).
			WithHint("%s", hostHint(root))
	}
	if o.Modules == "" {
		o.Modules = filepath.Join(root, "lib/modules", o.Release)
	}
	if o.Config == "" {
		config := filepath.Join(root, "boot/config-"+o.Release)
		if _, err := os.Stat(config); err == nil {
			o.Config = config
		}
	}
	return o, nil
}

// hostHint names the kernels that the host has.
func hostHint(root string) string {
	found, _ := filepath.Glob(filepath.Join(root, "boot/vmlinuz-*"))
	for i := range found {
		found[i] = strings.TrimPrefix(filepath.Base(found[i]), "vmlinuz-")
	}
	if len(found) == 0 {
		return "import a package or a file: banger kernel import FILE; banger setup makes the default kernel"
	}
	return "it has: " + strings.Join(found, ", ")
}

func (s *Store) importAs(ctx context.Context, o ImportOptions, sink progress.Sink) (Kernel, error) {
	name, err := s.shelf.Build(func(dir string) (string, any, error) {
		if err := disk.RequireFree(filepath.Dir(dir), kernelSpace, "a kernel"); err != nil {
			return "", nil, err
		}
		isPackage, err := startsWith(o.Source, "!<arch>\n")
		if err != nil {
			return "", nil, err
		}
		m := Manifest{Architecture: runtime.GOARCH, Source: filepath.Base(o.Source), CreatedAt: time.Now().UTC()}
		if isPackage {
			err = importPackage(ctx, dir, o, &m, sink)
		} else {
			err = importFile(ctx, dir, o, &m, sink)
		}
		if err != nil {
			return "", nil, err
		}
		if m.Name = m.Release; o.Name != "" {
			m.Name = o.Name
		}
		if s.shelf.Has(m.Name) { // kernels in use must not change under their name
			return "", nil, taken(m.Name)
		}
		return m.Name, m, nil
	})
	if err != nil {
		return Kernel{}, err
	}
	return s.Get(ctx, name)
}

// checkFile refuses what is no file of up to limit bytes. It opens nothing: the opening of a pipe waits for who writes to it.
func checkFile(path string, limit int64) error {
	info, err := fileio.Plain(path)
	switch {
	case err != nil:
		return err
	case info.Size() == 0:
		return fault.New(fault.Usage, "%s is empty", path)
	case info.Size() > limit:
		return fault.New(fault.Usage, "%s has %d bytes: no kernel has as many", path, info.Size())
	}
	return nil
}

func startsWith(path, magic string) (bool, error) {
	if err := checkFile(path, maxKernelFile); err != nil {
		return false, err
	}
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrPermission) { // Ubuntu keeps its own from being read
		return false, fault.Wrap(fault.Precondition, err, "cannot read the kernel").WithHint("let yourself read it: sudo chmod a+r %s", path)
	}
	if err != nil {
		return false, fault.Wrap(fault.Precondition, err, "cannot read the kernel")
	}
	defer func() { _ = f.Close() }()
	b := make([]byte, len(magic))
	_, err = io.ReadFull(f, b)
	return err == nil && string(b) == magic, nil
}

// importPackage makes the files of a kernel from a package on this host.
func importPackage(ctx context.Context, dir string, o ImportOptions, m *Manifest, sink progress.Sink) error {
	if o.Modules != "" || o.Config != "" {
		return fault.New(fault.Usage, "a package brings its modules and its configuration itself")
	}
	if _, err := findDepmod(); err != nil {
		return err
	}
	p, err := debian.ReadControl(o.Source)
	if err != nil {
		return err
	}
	if p.Architecture != runtime.GOARCH {
		return otherProcessor(p.Architecture, runtime.GOARCH)
	}
	m.Package, m.Version = p.Name, p.Version
	return kernelOfPackage(ctx, dir, o.Source, m, sink)
}

// importFile makes the files of a kernel from a boot image, and perhaps a directory of modules.
func importFile(ctx context.Context, dir string, o ImportOptions, m *Manifest, sink progress.Sink) error {
	sink.Update(Stage, "reading "+filepath.Base(o.Source), 0.1)
	content, err := os.ReadFile(o.Source)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot read the kernel")
	}
	b, err := parseKernel(ctx, content, runtime.GOARCH)
	if err != nil {
		return fault.Wrap(fault.KindOf(err), err, "%s", o.Source)
	}
	if o.Release != "" && b.release != o.Release {
		return fault.New(fault.Precondition, "%s is kernel %s, not %s", o.Source, b.release, o.Release)
	}
	m.Release = b.release
	files, err := writeBoot(dir, b)
	if err != nil {
		return err
	}
	config, err := configOf(o, b)
	if err != nil {
		return err
	}
	if config != nil {
		files = append(files, configName)
		if err := os.WriteFile(filepath.Join(dir, configName), config, 0o600); err != nil {
			return err
		}
	}
	if o.Modules == "" {
		m.BootModules, err = builtInModules(dir, b, config)
		files = append(files, bootName)
	} else {
		sink.Update(Stage, "preparing modules", 0.4)
		m.BootModules, err = modulesOf(ctx, dir, o.Modules, b.release)
		files = append(files, bootName, modulesName)
	}
	if err != nil {
		return err
	}
	m.Files, err = artifact.Describe(dir, files...)
	return err
}

// writeBoot writes the boot image in the forms there are, and returns the files' names.
func writeBoot(dir string, b boot) ([]string, error) {
	forms := map[string][]byte{bzImageName: b.compressed, elfName: b.plain}
	if runtime.GOARCH == "arm64" {
		forms = map[string][]byte{bzImageName: b.plain}
	}
	var names []string
	for name, content := range forms {
		if content == nil {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, name), content, 0o600); err != nil {
			return nil, err
		}
		names = append(names, name)
	}
	slices.Sort(names)
	return names, nil
}

// configOf finds the configuration: as given, or in the kernel itself. nil: it is not known.
func configOf(o ImportOptions, b boot) ([]byte, error) {
	if o.Config == "" {
		return embeddedConfig(b.plain), nil
	}
	if err := checkFile(o.Config, maxConfigFile); err != nil {
		return nil, err
	}
	config, err := os.ReadFile(o.Config)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot read the kernel's configuration")
	}
	if len(parseConfig(config)) == 0 {
		return nil, fault.New(fault.Usage, "%s is no configuration of a kernel", o.Config)
	}
	return config, nil
}

// builtInModules is the list of a kernel without modules: what it needs must be in it. Where its configuration is not
// known, the names that drivers and file systems register are looked for.
func builtInModules(dir string, b boot, config []byte) ([]BootModule, error) {
	f, err := os.OpenFile(filepath.Join(dir, bootName), os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	if err := errors.Join(newArchive(f).close(), f.Close()); err != nil {
		return nil, err
	}
	known := parseConfig(config)
	var modules []BootModule
	for _, name := range append(slices.Clone(bootModules), optionalModules...) {
		value := known[builtInOption[name]]
		if value == "y" || config == nil && registers(b.plain, name) {
			modules = append(modules, BootModule{Name: name})
			continue
		}
		if slices.Contains(optionalModules, name) || name == "virtio_mmio" || name == "virtio_rng" {
			continue
		}
		err := fault.New(fault.Precondition, "kernel %s has no %s built in", b.release, name)
		if value == "m" || config == nil {
			return nil, err.WithHint("give its modules: banger kernel import FILE --modules /lib/modules/%s", b.release)
		}
		return nil, err.WithHint("build it with CONFIG_%s=y", builtInOption[name])
	}
	return modules, nil
}

// registers tells whether a kernel has a driver or file system built in, by the name that it registers: a string of the
// kernel's own, with an underscore or a dash.
func registers(image []byte, name string) bool {
	return bytes.Contains(image, []byte(name+"\x00")) || bytes.Contains(image, []byte(strings.ReplaceAll(name, "_", "-")+"\x00"))
}

// modulesOf makes the modules disk, and the modules of the initramfs, of a directory like /lib/modules/<release>.
func modulesOf(ctx context.Context, dir, tree, release string) ([]BootModule, error) {
	if _, err := os.Stat(filepath.Join(tree, "kernel")); err != nil {
		return nil, fault.New(fault.Usage, "%s is no directory of modules", tree).
			WithHint("give the one that is called as the release: /lib/modules/%s", release)
	}
	if base := filepath.Base(tree); base != release {
		return nil, fault.New(fault.Precondition, "the modules in %s are those of another kernel than %s", tree, release).
			WithHint("give the directory that is called %s", release)
	}
	if _, err := os.Stat(filepath.Join(tree, "modules.dep")); err != nil {
		work := filepath.Join(dir, "work")
		copied := filepath.Join(work, "lib/modules", release)
		if err := os.CopyFS(copied, os.DirFS(tree)); err != nil {
			return nil, fault.Wrap(fault.Precondition, err, "cannot copy the modules")
		}
		defer func() { _ = os.RemoveAll(work) }() // with the whole directory, if not here
		if err := runDepmod(ctx, work, release); err != nil {
			return nil, err
		}
		tree = copied
	}
	if err := writeModulesDisk(ctx, tree, filepath.Join(dir, modulesName)); err != nil {
		return nil, err
	}
	return writeBootModules(tree, release, filepath.Join(dir, bootName))
}
