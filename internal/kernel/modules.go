package kernel

import (
	"bufio"
	"io"
	"path"
	"slices"
	"strings"

	"banger/internal/fault"
)

// bootModules are the modules an initramfs loads before the root file system can be mounted, as
// far as the kernel does not have them built in.
var bootModules = []string{"virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net", "virtio_console", "virtio_rng", "ext4", "overlay"}

// optionalModules can be asked for: the guest channel over vsock needs its transport.
var optionalModules = []string{"vmw_vsock_virtio_transport"}

// dependencies is what depmod's modules.dep says: path of a module to the paths of those it needs.
type dependencies map[string][]string

// parseDependencies reads modules.dep: "kernel/a.ko.xz: kernel/b.ko.xz kernel/c.ko.xz", where c must
// be loaded before b and all of them before a.
func parseDependencies(r io.Reader) (dependencies, error) {
	deps := dependencies{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		module, needs, ok := strings.Cut(lines.Text(), ":")
		if !ok {
			return nil, fault.New(fault.Precondition, "bad line in modules.dep: %q", lines.Text())
		}
		deps[module] = strings.Fields(needs)
	}
	return deps, lines.Err()
}

// moduleName returns a module's name as the kernel says it: "kernel/drivers/net/virtio-net.ko.xz" is virtio_net.
func moduleName(file string) string {
	base, _, _ := strings.Cut(path.Base(file), ".")
	return strings.ReplaceAll(base, "-", "_")
}

func (d dependencies) find(name string) (file string, ok bool) {
	for file := range d {
		if moduleName(file) == name {
			return file, true
		}
	}
	return "", false
}

// closure returns the files to load for a module, in order, itself last; nil when the kernel has
// no such module.
func (d dependencies) closure(name string) []string {
	file, ok := d.find(name)
	if !ok {
		return nil
	}
	order := slices.Clone(d[file])
	slices.Reverse(order)
	return append(order, file)
}

// builtIn reads modules.builtin, one path a line, and returns the names.
func builtIn(r io.Reader) (map[string]bool, error) {
	names := map[string]bool{}
	lines := bufio.NewScanner(r)
	for lines.Scan() {
		names[moduleName(lines.Text())] = true
	}
	return names, lines.Err()
}

// unpackedName is the name of a module's file once it is decompressed.
func unpackedName(file string) string {
	for _, suffix := range []string{".xz", ".zst", ".gz"} {
		file = strings.TrimSuffix(file, suffix)
	}
	return file
}
