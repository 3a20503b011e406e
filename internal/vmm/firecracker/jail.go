package firecracker

import (
	"errors"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// jailDir holds the jail of a machine whose Firecracker upstream's jailer starts: as a user of its own, in a root of its
// own with hard links to its files.
const jailDir = "jail"

// Names inside a jail.
const (
	jailedKernel = "kernel"
	jailedInitrd = "initrd"
	jailedSaved  = "saved"
)

// view is a machine as its Firecracker names its files.
type view struct {
	machine vmm.Machine
	saved   string // directory of the saved machine that it is restored from
}

// seen returns the names for a machine.
func (d *Driver) seen(m vmm.Machine, saved string) view {
	v := view{machine: m, saved: saved}
	if !d.o.Jailer {
		return v
	}
	if m.Kernel != "" {
		v.machine.Kernel = jailedKernel
	}
	if m.Initramfs != "" {
		v.machine.Initramfs = jailedInitrd
	}
	if saved != "" {
		v.saved = jailedSaved
	}
	return v
}

// home is where Firecracker's relative names lead to, for the machine in dir: that, or the root of its jail.
func home(dir string) string {
	roots, err := filepath.Glob(filepath.Join(escapeGlob(dir), jailDir, "*", "*", "root"))
	if err == nil && len(roots) == 1 {
		return roots[0]
	}
	return dir
}

// jailUser is the user of a machine's own: of those that neither people, containers nor systemd's services have.
func jailUser(m vmm.Machine) (int, error) {
	const first, mask = 0x70000000, 0x0fffffff
	n, err := strconv.ParseUint(string(m.ID), 16, 64)
	if err != nil {
		return 0, fault.Wrap(fault.Unexpected, err, "machine %s has no user for its jail", m.Name)
	}
	return first | int(n&mask), nil
}

// checkJailer finds the jailer, which is a part of each Firecracker's release.
func (d *Driver) checkJailer(binary string) (string, error) {
	if os.Geteuid() != 0 {
		return "", fault.New(fault.Precondition, "Firecracker's jailer needs root, which this daemon does not have").
			WithHint("remove jailer from section [firecracker] of config.toml: Firecracker is confined without it, too")
	}
	real, err := filepath.EvalSymlinks(binary)
	if err != nil {
		return "", fault.Wrap(fault.Precondition, err, "cannot find Firecracker")
	}
	for _, name := range []string{"jailer", strings.Replace(filepath.Base(real), "firecracker", "jailer", 1)} {
		path := filepath.Join(filepath.Dir(real), name)
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() && path != real {
			return path, nil
		}
	}
	path, err := system.Find("jailer", "")
	if err != nil {
		return "", fault.New(fault.Precondition, "there is no jailer beside %s", real).WithHint("it comes with Firecracker's release: see docs/firecracker.md")
	}
	return path, nil
}

// jail makes the root for a machine and returns the command line that starts Firecracker in it.
func jail(f found, m vmm.Machine, saved string) ([]string, error) {
	user, err := jailUser(m)
	if err != nil {
		return nil, err
	}
	real, err := filepath.EvalSymlinks(f.binary)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot find Firecracker")
	}
	base := filepath.Join(m.Dir, jailDir)
	root := filepath.Join(base, filepath.Base(real), string(m.ID), "root")
	c := cell{dir: m.Dir, root: root, user: user}
	if err := c.furnish(m, saved); err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot make the jail of %s", m.Name).
			WithHint("images, kernels and VMs must be on one file system for the jailer")
	}
	for _, n := range m.NICs {
		if err := giveTAP(n.TAP, user); err != nil {
			return nil, fault.Wrap(fault.Precondition, err, "cannot give the network device %s to the jail of %s", n.TAP, m.Name)
		}
	}
	id := strconv.Itoa(user)
	return []string{
		"--id", string(m.ID), "--exec-file", real, "--uid", id, "--gid", id, "--chroot-base-dir", base,
		"--cgroup-version", cgroupVersion(), "--resource-limit", "no-file=" + strconv.Itoa(maxFiles), "--",
	}, nil
}

func cgroupVersion() string {
	var fs unix.Statfs_t
	if err := unix.Statfs(system.Cgroups, &fs); err == nil && fs.Type == unix.CGROUP2_SUPER_MAGIC {
		return "2"
	}
	return "1"
}

// cell is a jail's root being furnished.
type cell struct {
	dir, root string
	user      int
}

func (c cell) furnish(m vmm.Machine, saved string) error {
	if err := os.MkdirAll(c.root, 0o700); err != nil {
		return err
	}
	errs := []error{
		c.give(filepath.Join(c.dir, vmm.VMMLog), vmm.VMMLog, true), c.give(filepath.Join(c.dir, MetricsLog), MetricsLog, true),
		os.Lchown(c.root, c.user, c.user),
	}
	if m.Kernel != "" {
		errs = append(errs, c.give(m.Kernel, jailedKernel, false))
	}
	if m.Initramfs != "" {
		errs = append(errs, c.give(m.Initramfs, jailedInitrd, false))
	}
	for _, d := range m.Disks {
		errs = append(errs, c.give(d.Path, drivePath(d.Role), !d.ReadOnly))
	}
	if saved != "" {
		errs = append(errs, os.Mkdir(filepath.Join(c.root, jailedSaved), 0o755))
		for _, name := range []string{vmm.SavedState, vmm.SavedMemory} {
			errs = append(errs, c.give(filepath.Join(saved, name), filepath.Join(jailedSaved, name), false))
		}
	}
	return errors.Join(errs...)
}

// give links a file into the jail. What is written to, and what lies in the machine's own directory, becomes its
// user's; what is shared anybody may read, who gets as far: the directories around it are private.
func (c cell) give(path, name string, write bool) error {
	real, err := filepath.EvalSymlinks(machine.Absolute(c.dir, path))
	if err != nil {
		return err
	}
	info, err := os.Stat(real)
	if err != nil {
		return err
	}
	if own := filepath.Dir(real) == filepath.Clean(c.dir); write || own {
		err = os.Lchown(real, c.user, c.user)
	} else {
		err = os.Chmod(real, info.Mode().Perm()|0o444)
	}
	if err != nil {
		return err
	}
	return os.Link(real, filepath.Join(c.root, name))
}

// giveTAP lets a user attach to a TAP device.
func giveTAP(name string, user int) error {
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq(name)
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, r); err != nil {
		return err
	}
	return unix.IoctlSetInt(fd, unix.TUNSETOWNER, user)
}

// giveLike makes path the property of whom dir belongs to.
func giveLike(dir, path string) error {
	info, err := os.Stat(dir)
	if err != nil {
		return err
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); ok && int(owner.Uid) != os.Geteuid() {
		return os.Lchown(path, int(owner.Uid), int(owner.Gid))
	}
	return nil
}
