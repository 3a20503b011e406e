package bundle

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"banger/internal/fault"
)

// ManifestName is the file that says what is what.
const ManifestName = "bundle.json"

// Schema is the form of bundle.json that this banger writes, and the newest that it reads.
const Schema = 1

const maxManifest = 1 << 20 // bytes

// Manifest is the content of bundle.json. All paths are relative to the directory it lies in, slash-separated, and do
// not lead out of it.
type Manifest struct {
	Schema       int    `json:"schema"`
	Version      string `json:"version"`      // of banger, which packed it; "" when nobody did
	Architecture string `json:"architecture"` // as Go names it: amd64, arm64; "" fits all

	Kernel    string            `json:"kernel"`    // boot image
	Initramfs string            `json:"initramfs"` // the modules that an initramfs carries
	Modules   string            `json:"modules"`   // read-only ext4 for /lib/modules
	Image     string            `json:"image"`     // root file system of the default image
	VMMs      map[string]string `json:"vmms"`      // programs that run machines, by name: firecracker, jailer, qemu-system-x86_64
	Helpers   map[string]string `json:"helpers"`   // programs of banger's own, by name: banger-agent, banger-nethelper

	Files   []File   `json:"files"`   // what was put here by banger, for verify
	Sources []Source `json:"sources"` // where it came from
}

// File is one file that banger put here.
type File struct {
	Path   string `json:"path"`
	Size   int64  `json:"size"` // bytes
	SHA256 string `json:"sha256"`
	Sparse bool   `json:"sparse,omitempty"` // the sum leaves out blocks of zeros: artifact.SparseSum
}

// Source tells where a part came from.
type Source struct {
	Part    string `json:"part"` // "bundle", "firecracker"
	Version string `json:"version"`
	URL     string `json:"url"` // or the path of a file
	SHA256  string `json:"sha256"`

	Manifest string `json:"manifest,omitempty"` // the runtime-bundle.toml that listed it
}

// Bundle is a runtime directory as it was read.
type Bundle struct {
	Dir      string
	Manifest Manifest
	Bare     bool // without bundle.json: what is there was recognised by its name
}

// Read returns the bundle in dir. A directory without bundle.json, and one that is not there, is a bare bundle of what
// its file names tell. A bundle.json that cannot be understood is a Precondition fault.
func Read(dir string) (Bundle, error) {
	f, err := os.Open(filepath.Join(dir, ManifestName))
	if errors.Is(err, fs.ErrNotExist) {
		return Bundle{Dir: dir, Manifest: recognise(dir), Bare: true}, nil
	}
	if err != nil {
		return Bundle{}, fault.Wrap(fault.Precondition, err, "cannot read the runtime directory")
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxManifest+1))
	if err != nil {
		return Bundle{}, fault.Wrap(fault.Precondition, err, "cannot read %s", f.Name())
	}
	m, err := Parse(text)
	if err != nil {
		return Bundle{}, fault.Wrap(fault.Precondition, err, "%s", f.Name()).
			WithHint("remove that file and run: banger runtime fetch")
	}
	return Bundle{Dir: dir, Manifest: m}, nil
}

// Parse reads the text of a bundle.json. Keys it does not know are passed over: a newer banger may have written them.
func Parse(text []byte) (Manifest, error) {
	var m Manifest
	if len(text) > maxManifest {
		return m, fault.New(fault.Precondition, "the manifest is larger than %d bytes", maxManifest)
	}
	if err := json.NewDecoder(bytes.NewReader(text)).Decode(&m); err != nil {
		return m, fault.Wrap(fault.Precondition, err, "the manifest is no valid JSON")
	}
	return m, m.check()
}

func (m Manifest) check() error {
	switch {
	case m.Schema < 1 || m.Schema > Schema:
		return fault.New(fault.Precondition, "the manifest has schema %d, this banger reads 1 to %d", m.Schema, Schema)
	case m.Architecture != "" && m.Architecture != runtime.GOARCH:
		return fault.New(fault.Precondition, "the bundle is for %s, this machine is %s", m.Architecture, runtime.GOARCH)
	}
	named := []string{m.Kernel, m.Initramfs, m.Modules, m.Image}
	named = slices.AppendSeq(named, maps.Values(m.VMMs))
	named = slices.AppendSeq(named, maps.Values(m.Helpers))
	for _, f := range m.Files {
		if f.Path == "" {
			return fault.New(fault.Precondition, "the manifest names a file without a path")
		}
		named = append(named, f.Path)
	}
	for _, path := range named {
		if path != "" && !filepath.IsLocal(path) {
			return fault.New(fault.Precondition, "the manifest names %q, which is not inside of its directory", path)
		}
	}
	return nil
}

// Path returns where a file that the manifest names lies; "" stays "".
func (b Bundle) Path(named string) string {
	if named == "" {
		return ""
	}
	return filepath.Join(b.Dir, filepath.FromSlash(named))
}

// SourceOf tells where the part that the file at path belongs to came from. Parts that banger put here lie in directories whose
// names begin with what they are.
func (b Bundle) SourceOf(path string) (Source, bool) {
	rel, err := filepath.Rel(b.Dir, path)
	if err != nil {
		return Source{}, false
	}
	part, inside, _ := strings.Cut(filepath.ToSlash(rel), "/")
	i := slices.IndexFunc(b.Manifest.Sources, func(s Source) bool { return inside != "" && strings.HasPrefix(part, s.Part+"-") })
	if i < 0 {
		return Source{}, false
	}
	return b.Manifest.Sources[i], true
}

// HasVMM tells whether the manifest names a program that begins with name, as a driver of VMs is called.
func (b Bundle) HasVMM(driver string) bool {
	for name := range b.Manifest.VMMs {
		if strings.HasPrefix(name, driver) {
			return true
		}
	}
	return false
}

// Empty tells whether nothing is in it.
func (b Bundle) Empty() bool { return len(b.Parts()) == 0 }

// Part is one thing that a bundle has.
type Part struct {
	Name string // "kernel", "initramfs", "modules", "image", or the name of a program
	Path string // absolute
}

// Parts lists what the manifest names, in a fixed order.
func (b Bundle) Parts() []Part {
	m := b.Manifest
	var parts []Part
	add := func(name, named string) {
		if named != "" {
			parts = append(parts, Part{Name: name, Path: b.Path(named)})
		}
	}
	add("kernel", m.Kernel)
	add("initramfs", m.Initramfs)
	add("modules", m.Modules)
	add("image", m.Image)
	for _, programs := range []map[string]string{m.VMMs, m.Helpers} {
		for _, name := range slices.Sorted(maps.Keys(programs)) {
			add(name, programs[name])
		}
	}
	return parts
}

// bareNames are what things are called in a directory without bundle.json, the preferred name first.
var bareNames = struct{ kernel, initramfs, modules, image, vmms, helpers []string }{
	kernel:    []string{"vmlinux", "vmlinuz", "bzImage", "Image"},
	initramfs: []string{"boot-modules.cpio", "initramfs.img", "initrd.img"},
	modules:   []string{"modules.ext4"},
	image:     []string{"root.ext4", "rootfs.ext4"},
	vmms:      []string{"firecracker", "jailer", "qemu-system-x86_64", "qemu-system-aarch64"},
	helpers:   []string{"banger-agent", "banger-nethelper"},
}

func recognise(dir string) Manifest {
	first := func(names []string) string {
		for _, name := range names {
			if isFile(filepath.Join(dir, name)) {
				return name
			}
		}
		return ""
	}
	programs := func(names []string) map[string]string {
		found := map[string]string{}
		for _, name := range names {
			if isFile(filepath.Join(dir, name)) {
				found[name] = name
			}
		}
		return found
	}
	return Manifest{
		Schema: Schema, Kernel: first(bareNames.kernel), Initramfs: first(bareNames.initramfs),
		Modules: first(bareNames.modules), Image: first(bareNames.image),
		VMMs: programs(bareNames.vmms), Helpers: programs(bareNames.helpers),
	}
}
