package boot

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
)

const (
	diskWait = 20 * time.Second     // a disk may take under a slow VMM
	diskPoll = 2 * time.Millisecond // between two looks for it
)

// mountKernel mounts the kernel's own file systems in the initramfs.
func mountKernel() error {
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, m := range []struct {
		fstype, target string
		flags          uintptr
		data           string
	}{
		{"proc", "/proc", safe, ""},
		{"sysfs", "/sys", safe, ""},
		{"devtmpfs", "/dev", unix.MS_NOSUID, "mode=0755"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	return nil
}

// openConsole makes the console the standard streams: an initramfs need not have had one.
func openConsole() error {
	f, err := os.OpenFile("/dev/console", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	for fd := range 3 {
		if err := unix.Dup3(int(f.Fd()), fd, 0); err != nil {
			return err
		}
	}
	return f.Close()
}

// diskPlan says which device is what. An empty name: there is none.
type diskPlan struct {
	root, overlay, work, modules string
	rootReadOnly                 bool
}

// planDisks gives each disk its device by its place: the first is /dev/vda.
func planDisks(disks []*agentv1.Disk) (diskPlan, error) {
	var p diskPlan
	for i, d := range disks {
		if i >= 26 {
			return p, errors.New("more than 26 disks")
		}
		device := "/dev/vd" + string(rune('a'+i))
		var role *string
		switch d.GetRole() {
		case agentv1.Disk_ROLE_ROOT:
			role, p.rootReadOnly = &p.root, d.GetReadOnly()
		case agentv1.Disk_ROLE_OVERLAY:
			role = &p.overlay
		case agentv1.Disk_ROLE_WORK:
			role = &p.work
		case agentv1.Disk_ROLE_MODULES:
			role = &p.modules
		default:
			continue // a data disk is the user's
		}
		if *role != "" {
			return p, fmt.Errorf("two disks are %s", d.GetRole())
		}
		*role = device
	}
	if p.root == "" {
		return p, errors.New("the guest config names no root disk")
	}
	if p.overlay == "" && p.rootReadOnly {
		return p, errors.New("the root disk is read-only and there is no overlay disk")
	}
	return p, nil
}

// waitFor waits for a device node.
func waitFor(device string) error {
	for end := time.Now().Add(diskWait); ; time.Sleep(diskPoll) {
		if _, err := os.Stat(device); err == nil {
			return nil
		}
		if time.Now().After(end) {
			return fmt.Errorf("the disk %s did not appear within %v", device, diskWait)
		}
	}
}

func mountExt4(device, target string, flags uintptr) error {
	if err := waitFor(device); err != nil {
		return err
	}
	if err := os.MkdirAll(target, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(device, target, "ext4", flags, ""); err != nil {
		return fmt.Errorf("mount %s on %s: %w", device, target, err)
	}
	return nil
}

// mountRoot mounts the root file system on /newroot, and on its /run a tmpfs that holds the overlay disk.
func mountRoot(p diskPlan) error {
	if p.overlay == "" {
		if err := mountExt4(p.root, "/newroot", 0); err != nil {
			return err
		}
		return mountRun()
	}
	if err := mountExt4(p.root, "/lower", unix.MS_RDONLY|unix.MS_NOATIME); err != nil {
		return err
	}
	if err := mountExt4(p.overlay, "/overlay", 0); err != nil {
		return err
	}
	for _, dir := range []string{"/overlay/upper", "/overlay/work", "/overlay/plain", "/newroot"} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	// redirect_dir: a directory of the image can be renamed like any other.
	options := "lowerdir=/lower,upperdir=/overlay/upper,workdir=/overlay/work,redirect_dir=on"
	if err := unix.Mount("overlay", "/newroot", "overlay", 0, options); err != nil {
		return fmt.Errorf("mount the overlay root: %w", err)
	}
	if err := mountRun(); err != nil {
		return err
	}
	if err := os.Mkdir("/newroot"+OverlayDir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount("/overlay", "/newroot"+OverlayDir, "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the overlay disk: %w", err)
	}
	return nil
}

// mountRun mounts /run as systemd would; systemd keeps what it finds.
func mountRun() error {
	if err := os.MkdirAll("/newroot/run", 0o755); err != nil {
		return err
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_STRICTATIME
	if err := unix.Mount("tmpfs", "/newroot/run", "tmpfs", flags, "mode=0755,size=20%,nr_inodes=800k"); err != nil {
		return fmt.Errorf("mount /run: %w", err)
	}
	if err := os.Mkdir("/newroot"+keepDir, 0o700); err != nil {
		return err
	}
	return os.Mkdir("/newroot"+Dir, 0o755)
}

// switchRoot makes /newroot the root of this process and its children.
func switchRoot() error {
	for _, dir := range []string{"/proc", "/sys", "/dev"} {
		if err := os.MkdirAll("/newroot"+dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(dir, "/newroot"+dir, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", dir, err)
		}
	}
	if err := unix.Chdir("/newroot"); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("move the root: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("change the root: %w", err)
	}
	return unix.Chdir("/")
}

// mountRest mounts, in the new root, what the agent and its programs need before the image's init runs.
func mountRest(p diskPlan, plainDirs []string, modules string) error {
	for _, m := range []struct {
		fstype, target string
		flags          uintptr
		data           string
	}{
		{"devpts", "/dev/pts", unix.MS_NOSUID | unix.MS_NOEXEC, "mode=0620,gid=5,ptmxmode=0666"},
		{"tmpfs", "/dev/shm", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
	} {
		if err := os.MkdirAll(m.target, 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m.fstype, m.target, m.fstype, m.flags, m.data); err != nil {
			return fmt.Errorf("mount %s: %w", m.target, err)
		}
	}
	if p.work != "" {
		if err := mountExt4(p.work, "/root", 0); err != nil {
			return err
		}
	}
	if p.modules != "" {
		if err := mountExt4(p.modules, modules, unix.MS_RDONLY|unix.MS_NOSUID|unix.MS_NODEV); err != nil {
			return err
		}
	}
	if p.overlay == "" {
		return nil
	}
	for _, dir := range plainDirs {
		if err := bindPlain(OverlayDir+"/plain", dir); err != nil {
			warn(err) // it stays on the overlay, where what needs more than that does not work
		}
	}
	return nil
}

// bindPlain mounts a directory of the overlay disk's own ext4 on dir. It begins empty, with the mode and
// owner of the image's directory; an image that has files there is refused, for they would be hidden.
func bindPlain(store, dir string) error {
	if !filepath.IsAbs(dir) {
		return fmt.Errorf("the directory %q is not absolute", dir)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	source := filepath.Join(store, plainName(dir))
	if err := seedPlain(source, dir); err != nil {
		return err
	}
	if err := unix.Mount(source, dir, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount %s from the overlay disk: %w", dir, err)
	}
	return nil
}

// plainName is a directory's name in the store: unique, and one level deep.
func plainName(dir string) string {
	clean := strings.TrimPrefix(filepath.Clean(dir), "/")
	return strings.NewReplacer("%", "%25", "/", "%2F").Replace(clean)
}

// seedPlain creates source unless it is there.
func seedPlain(source, from string) error {
	_, err := os.Stat(source)
	if err == nil || !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(from)
	if err != nil {
		return err
	}
	if len(entries) > 0 {
		return fmt.Errorf("%s cannot be put on the overlay disk: the image has files in it", from)
	}
	if err := os.Mkdir(source, info.Mode().Perm()); err != nil {
		return err
	}
	var st unix.Stat_t
	if err := unix.Stat(from, &st); err != nil {
		return err
	}
	return os.Chown(source, int(st.Uid), int(st.Gid))
}

// MountControlGroups mounts the control groups where systemd would, and lets groups below the first have all controllers.
func MountControlGroups() error {
	const dir = "/sys/fs/cgroup"
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("cgroup2", dir, "cgroup2", flags, "nsdelegate"); err != nil && !errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("mount %s: %w", dir, err)
	}
	controllers, err := os.ReadFile(dir + "/cgroup.controllers")
	if err != nil {
		return err
	}
	for _, c := range strings.Fields(string(controllers)) {
		if err := os.WriteFile(dir+"/cgroup.subtree_control", []byte("+"+c), 0); err != nil {
			return fmt.Errorf("hand down the controller %s: %w", c, err)
		}
	}
	return nil
}
