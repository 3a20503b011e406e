package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"
)

// hierarchy is the control groups while programs stand still.
type hierarchy struct {
	root  string   // where they can be reached
	mount *os.File // when they are mounted for us alone
	from  string   // the group that was emptied into one below it; empty: there is none
}

// gathered is the group, below the first process's, that holds the first process and its like in a guest whose init makes
// no groups, while they stand still.
const gathered = "banger-held"

// open finds the control groups where inits mount them; else they are mounted for this process alone, in nobody's tree.
func open() (*hierarchy, error) {
	for _, dir := range []string{Root, Root + "/unified"} {
		if mountedOn(dir) {
			return &hierarchy{root: dir}, nil
		}
	}
	mount, err := mountAside()
	switch {
	case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EINVAL):
		return nil, fmt.Errorf("the kernel has no control groups of version 2: %w", errors.ErrUnsupported)
	case err != nil:
		return nil, fmt.Errorf("mount the control groups: %w", err)
	}
	return &hierarchy{root: fmt.Sprintf("/proc/self/fd/%d", mount.Fd()), mount: mount}, nil
}

// MadeByFirst tells whether the first process has mounted the control groups and is in one of its own.
func MadeByFirst() bool {
	first, err := os.ReadFile("/proc/1/cgroup")
	return err == nil && mountedOn(Root) && groupIn(string(first)) != "/"
}

// aside is the agent's own group until the first process has made one for it.
const aside = "banger-agent"

// stepAside leaves the group of a first process that makes groups, which takes along whom it finds in the root of all:
// nobody can stand still there without the other.
func stepAside() error {
	first, err := os.ReadFile("/proc/1/cgroup")
	if err != nil {
		return err
	}
	own, err := Own()
	if err != nil || apart(own, groupIn(string(first))) {
		return err
	}
	dir := filepath.Join(Root, aside)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := enter(dir, os.Getpid()); !ended(err) {
		return err
	}
	return nil // the first process has just taken us to a group of its own, and that one is removed
}

// apart tells whether who is in the group own can go on without the first process.
func apart(own, first string) bool { return own != "/" && own != first }

// take moves the guard, unless it is 0 or has ended, to the group own.
func (h *hierarchy) take(guard int, own string) error {
	if guard == 0 || own == "" {
		return nil
	}
	at, err := of(strconv.Itoa(guard))
	if ended(err) || errors.Is(err, syscall.ESRCH) || at == own {
		return nil
	}
	if err == nil {
		err = enter(filepath.Join(h.root, own), guard)
	}
	if ended(err) || errors.Is(err, syscall.ESRCH) { // who finds this process elsewhere afterwards tries again
		return nil
	}
	return err
}

// stillBeside tells whether this process and the guard are in the group own, without the first process.
func stillBeside(own string, guard int, makesGroups bool) (bool, error) {
	now, err := Own()
	if err != nil || now != own || !makesGroups {
		return now == own, err
	}
	if guard != 0 {
		at, err := of(strconv.Itoa(guard))
		if err == nil && at != own {
			return false, nil
		}
	}
	first, err := os.ReadFile("/proc/1/cgroup")
	return apart(now, groupIn(string(first))), err
}

// Join moves a process into the group of this one, and tidies up.
func Join(pid int) error {
	own, err := Own()
	if own == "" || err != nil || !mountedOn(Root) {
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), movesWait)
	defer cancel()
	moves, err := lockMoves(ctx, Root)
	if err != nil {
		return err
	}
	defer moves.Close()
	if err := enter(filepath.Join(Root, own), pid); err != nil {
		return err
	}
	tidy()
	return nil
}

const (
	movesWait = 10 * time.Second // Freeze takes less
	movesPoll = 5 * time.Millisecond
)

// lockMoves locks the groups below root, until it is closed, for who moves the agent from one to another, and for who
// lets groups stand still. An agent that comes into a group which has just been told to stands still with it, and there is nobody
// to let them go.
func lockMoves(ctx context.Context, root string) (*flock.Flock, error) {
	lock := flock.New(root, flock.SetFlag(os.O_RDONLY))
	if _, err := lock.TryLockContext(ctx, movesPoll); err != nil {
		return nil, errors.Join(fmt.Errorf("lock the control groups: %w", err), lock.Close())
	}
	return lock, nil
}

// tidy removes what was stepped aside to, unless somebody is there, or about to be.
func tidy() {
	removeUnlessKept(filepath.Join(Root, aside, programs))
	_ = os.Remove(filepath.Join(Root, aside))
}

// keepMost is how often a group is made that somebody else removes.
const keepMost = 5

// keep opens a group, made when it is not there. It is not removed by removeUnlessKept while it is open: a program cannot
// be started in a group that is gone, and the error would be that of a program that is not there.
func keep(dir string) (*os.File, error) {
	for range keepMost {
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		f, err := os.Open(dir)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return nil, err
		}
		there, err := lockShared(f)
		if there && err == nil {
			return f, nil
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, err
		}
	}
	return nil, fmt.Errorf("the control group %s is removed again and again", dir)
}

// lockShared locks a directory for as long as it is open, and tells whether it is still there. Whoever removes it holds
// the lock only for that moment.
func lockShared(f *os.File) (there bool, err error) {
	if err := unix.Flock(int(f.Fd()), unix.LOCK_SH); err != nil {
		return false, fmt.Errorf("lock %s: %w", f.Name(), err)
	}
	ours, err := f.Stat()
	if err != nil {
		return false, err
	}
	now, err := os.Stat(f.Name())
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	return err == nil && os.SameFile(ours, now), err
}

// removeUnlessKept removes a group in which nobody is, and that nobody keeps.
func removeUnlessKept(dir string) {
	f, err := os.Open(dir)
	if err != nil {
		return
	}
	defer f.Close()
	if unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		_ = os.Remove(dir)
	}
}

func enter(dir string, pid int) error {
	return os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

func mountedOn(dir string) bool {
	var st unix.Statfs_t
	return unix.Statfs(dir, &st) == nil && st.Type == unix.CGROUP2_SUPER_MAGIC
}

func mountAside() (*os.File, error) {
	fsfd, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return nil, err
	}
	defer unix.Close(fsfd)
	if err := unix.FsconfigCreate(fsfd); err != nil {
		return nil, err
	}
	fd, err := unix.Fsmount(fsfd, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), "cgroup2"), nil
}

// Close lets go of what was mounted for us.
func (h *hierarchy) Close() error {
	if h.mount == nil {
		return nil
	}
	return h.mount.Close()
}

// gather moves the first process, and others beside it, into a group that can be frozen when theirs cannot: it is the
// root of all, or this process's own is below it. One that makes groups itself is not to be moved: it would take that group
// for the root of all. proc is where processes are listed.
func (h *hierarchy) gather(ctx context.Context, own, proc string, note func(group string) error) error {
	first, err := os.ReadFile(filepath.Join(proc, "1/cgroup"))
	if err != nil {
		return err
	}
	at := groupIn(string(first))
	if at != "/" && at != own && !strings.HasPrefix(own, at+"/") {
		return nil
	}
	from := filepath.Join(h.root, at)
	if err := note(filepath.Join(at, gathered)); err != nil {
		return fmt.Errorf("note it: %w", err)
	}
	if err := os.Mkdir(filepath.Join(from, gathered), 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	h.from = from
	for { // somebody who was not moved yet may make another one
		if err := ctx.Err(); err != nil {
			return err
		}
		moved, err := move(from, filepath.Join(from, gathered), func(pid int) bool { return stays(proc, pid) })
		if err != nil || !moved {
			return err
		}
	}
}

// disband moves those who were gathered back to where they were.
func (h *hierarchy) disband() error {
	if h.from == "" {
		return nil
	}
	group := filepath.Join(h.from, gathered)
	for range 100 { // they may make others meanwhile
		if _, err := move(group, h.from, func(int) bool { return false }); err != nil {
			return err
		}
		err := os.Remove(group)
		if err == nil || errors.Is(err, fs.ErrNotExist) {
			h.from = ""
			return nil
		}
		if !errors.Is(err, syscall.EBUSY) {
			return err
		}
	}
	return fmt.Errorf("programs keep starting others in %s", group)
}

// move moves the processes of a group to another one and tells whether there were any, besides those that stay.
func move(from, to string, stays func(pid int) bool) (moved bool, err error) {
	text, err := os.ReadFile(filepath.Join(from, "cgroup.procs"))
	if ended(err) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	for _, word := range strings.Fields(string(text)) {
		pid, err := strconv.Atoi(word)
		if err != nil || pid == 0 || stays(pid) { // 0 is one of another name space
			continue
		}
		err = enter(to, pid)
		switch {
		case err == nil:
			moved = true
		case !errors.Is(err, syscall.ESRCH):
			return moved, fmt.Errorf("move process %d to %s: %w", pid, to, err)
		}
	}
	return moved, nil
}

// stays tells who is not stopped: the kernel's threads and the dead, which have no program, and the agent's own processes
// but for those that work for users.
func stays(proc string, pid int) bool {
	dir := filepath.Join(proc, strconv.Itoa(pid))
	theirs, err := os.Stat(filepath.Join(dir, "exe"))
	if err != nil {
		return true
	}
	ours, err := os.Stat(filepath.Join(proc, "self/exe"))
	if err != nil || !os.SameFile(theirs, ours) {
		return false
	}
	line, err := os.ReadFile(filepath.Join(dir, "cmdline"))
	args := strings.Split(string(line), "\x00")
	return err == nil && len(args) > 1 && slices.Contains([]string{"serve", "supervise", "guard", "start"}, args[1])
}
