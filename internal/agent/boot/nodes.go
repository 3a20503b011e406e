package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

// node is a device that exists before its module is loaded: opening it loads the module.
type node struct {
	name         string // below /dev
	mode         uint32
	major, minor uint32
}

// openToAll are the devices that everyone may open, as systemd's own list has it.
var openToAll = map[string]bool{"net/tun": true, "fuse": true, "kvm": true, "vhost-net": true, "vhost-vsock": true}

// staticNodes reads modules.devname, which depmod writes: "module name c10:200". Other lines are passed over.
func staticNodes(text string) []node {
	var out []node
	for line := range strings.Lines(text) {
		var module, name string
		var kind rune
		n := node{mode: 0o600}
		if strings.HasPrefix(line, "#") {
			continue
		}
		if _, err := fmt.Sscanf(line, "%s %s %c%d:%d", &module, &name, &kind, &n.major, &n.minor); err != nil {
			continue
		}
		if !filepath.IsLocal(name) {
			continue
		}
		if openToAll[name] {
			n.mode = 0o666
		}
		n.name = name
		switch kind {
		case 'c':
			n.mode |= unix.S_IFCHR
		case 'b':
			n.mode |= unix.S_IFBLK
		default:
			continue
		}
		out = append(out, n)
	}
	return out
}

// makeNodes makes the static device nodes of the modules in dir, opens to everyone those that are meant for
// everyone, which the kernel makes itself where it has the module built in, and makes the links that programs
// expect in /dev. udev and tmpfiles would do it, a second later or, masked, never.
func makeNodes(dir string) error {
	for name := range openToAll {
		if err := os.Chmod("/dev/"+name, 0o666); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for name, target := range map[string]string{
		"fd": "/proc/self/fd", "stdin": "/proc/self/fd/0", "stdout": "/proc/self/fd/1", "stderr": "/proc/self/fd/2",
	} {
		if err := os.Symlink(target, "/dev/"+name); err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	text, err := os.ReadFile(filepath.Join(dir, "modules.devname"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, n := range staticNodes(string(text)) {
		path := filepath.Join("/dev", n.name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		err := unix.Mknod(path, n.mode, int(unix.Mkdev(n.major, n.minor)))
		if errors.Is(err, unix.EEXIST) {
			continue
		}
		if err != nil {
			return fmt.Errorf("make the device %s: %w", path, err)
		}
		if err := os.Chmod(path, fs.FileMode(n.mode&0o777)); err != nil { // Mknod minds the umask
			return err
		}
	}
	return nil
}
