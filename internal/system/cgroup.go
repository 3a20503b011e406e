package system

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Cgroups is where the kernel shows control groups (cgroups(7)).
const Cgroups = "/sys/fs/cgroup"

// CgroupLimits bound a control group. Zero values mean no bound.
type CgroupLimits struct {
	MemoryHigh int64 // bytes above which it is slowed down and its memory taken back
	PIDs       int   // threads
	CPUWeight  int   // its share when processors are short: 100 is ordinary
}

// NewCgroup makes a control group beside ours and returns its directory, open, for StartOptions. It is nil without an
// error where no place is ours to make one in: there is only version 1, or nobody delegated a part of the tree to us.
func NewCgroup(name string, l CgroupLimits) (*os.File, error) {
	return newCgroup(Cgroups, "/proc/self/cgroup", name, l)
}

func newCgroup(root, ours, name string, l CgroupLimits) (*os.File, error) {
	parent := delegated(root, ours)
	if parent == "" {
		return nil, nil
	}
	for _, controller := range []string{"memory", "pids", "cpu"} {
		// What the parent has not got, or may not give while it has processes of its own, is not limited.
		_ = os.WriteFile(filepath.Join(parent, "cgroup.subtree_control"), []byte("+"+controller), 0)
	}
	dir := filepath.Join(parent, name)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return nil, fmt.Errorf("make the control group %s: %w", name, err)
	}
	for file, limit := range map[string]int64{
		"memory.high": l.MemoryHigh, "pids.max": int64(l.PIDs), "cpu.weight": int64(l.CPUWeight),
	} {
		if limit == 0 {
			continue
		}
		err := os.WriteFile(filepath.Join(dir, file), []byte(strconv.FormatInt(limit, 10)), 0)
		if err != nil && !errors.Is(err, os.ErrNotExist) && !errors.Is(err, os.ErrPermission) {
			return nil, errors.Join(fmt.Errorf("limit the control group %s: %w", name, err), os.Remove(dir))
		}
	}
	return os.Open(dir)
}

// delegated returns the group that ours is in, when it is ours to make groups in. For root every group is writable:
// there it is the mark that systemd gives delegated ones.
func delegated(root, ours string) string {
	var fs unix.Statfs_t
	if err := unix.Statfs(root, &fs); err != nil || fs.Type != unix.CGROUP2_SUPER_MAGIC {
		return ""
	}
	text, err := os.ReadFile(ours)
	if err != nil {
		return ""
	}
	own := unified(string(text))
	if own == "" || own == "/" {
		return ""
	}
	parent := filepath.Join(root, filepath.Dir(own))
	for _, file := range []string{"", "cgroup.procs", "cgroup.subtree_control"} {
		if unix.Access(filepath.Join(parent, file), unix.W_OK) != nil {
			return ""
		}
	}
	if os.Geteuid() == 0 && !marked(root, parent) {
		return ""
	}
	return parent
}

// unified finds the group of version 2 in /proc/<pid>/cgroup.
func unified(text string) string {
	for line := range strings.Lines(text) {
		if path, ok := strings.CutPrefix(strings.TrimSuffix(line, "\n"), "0::"); ok {
			return path
		}
	}
	return ""
}

// marked tells whether a group, or one that it is in, is marked as delegated (systemd.resource-control(5)).
func marked(root, group string) bool {
	for ; strings.HasPrefix(group, root+"/"); group = filepath.Dir(group) {
		for _, name := range []string{"user.delegate", "trusted.delegate"} {
			value := make([]byte, 8)
			if n, err := unix.Getxattr(group, name, value); err == nil && string(value[:n]) == "1" {
				return true
			}
		}
	}
	return false
}

// CgroupOf returns the directory of the control group that a process is in when that is one of this name, or "".
func CgroupOf(pid int, name string) string {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return ""
	}
	if own := unified(string(text)); filepath.Base(own) == name {
		return filepath.Join(Cgroups, own)
	}
	return ""
}

// RemoveCgroup removes a control group whose processes have ended, which the kernel may notice a moment later.
func RemoveCgroup(dir string) {
	const tries = 20
	for range tries {
		if err := os.Remove(dir); !errors.Is(err, unix.EBUSY) {
			return // gone, or nothing that another try would change: an empty group costs next to nothing
		}
		time.Sleep(5 * time.Millisecond)
	}
}
