package machine

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
)

// LockFile is held locked by a machine's process for its whole life. Nothing is written in it.
const LockFile = "vmm.lock"

// lockFDs are the descriptors under which a process may inherit the lock: the first extra one, or stdin where the
// others are closed on the way to it.
var lockFDs = []int{3, 0}

// A child of ours that has forked but not yet executed its program holds copies of our descriptors, and so a lock of
// nobody's: for a moment as a rule, and for as long as it waits for a processor.
const (
	lockPatience = 200 * time.Millisecond // with a lock that a machine's process has
	lockMost     = 5 * time.Second        // with one that none seems to have
)

// Lock takes the lock of the machine in dir. The file goes to the process as its first extra file;
// after that the caller closes it. A Conflict fault says that a process has it already.
func Lock(dir string) (*os.File, error) {
	f, err := os.OpenFile(filepath.Join(dir, LockFile), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot lock the machine's directory")
	}
	patience := lockPatience
	for begin := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return f, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			break
		}
		if time.Since(begin) < patience {
			continue
		}
		if patience == lockMost || locked(dir) {
			break
		}
		patience = lockMost
	}
	f.Close()
	if errors.Is(err, unix.EWOULDBLOCK) {
		return nil, fault.New(fault.Conflict, "the machine in %s has a process already", dir)
	}
	return nil, fmt.Errorf("lock %s: %w", filepath.Join(dir, LockFile), err)
}

// locked tells whether a machine's process has the lock.
func locked(dir string) bool {
	p, err := Find(dir, vmm.Handle{})
	if err != nil {
		return false
	}
	_ = p.Close() // it was only looked for
	return true
}

// Find takes hold of the process of the machine in dir: the one the handle names or, when the
// handle is zero, because the daemon died before it was recorded, the one that holds the lock.
// A NotFound fault says that there is none.
func Find(dir string, h vmm.Handle) (*system.Process, error) {
	gone := fault.New(fault.NotFound, "the machine in %s has no process", dir)
	var lock unix.Stat_t
	if err := unix.Stat(filepath.Join(dir, LockFile), &lock); err != nil {
		return nil, gone
	}
	if h.PID != 0 {
		p, err := system.Adopt(h.PID, h.StartTime)
		// After a reboot of the host the same two numbers may be another process's.
		if err == nil && !holds(h.PID, lock) {
			_ = p.Close()
			return nil, gone
		}
		return p, err
	}
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() || !holds(pid, lock) {
			continue
		}
		started, err := system.StartTime(pid)
		if err != nil {
			continue // it ended meanwhile
		}
		p, err := system.Adopt(pid, started)
		if err != nil {
			continue
		}
		if holds(pid, lock) {
			return p, nil
		}
		_ = p.Close()
	}
	return nil, gone
}

// holds tells whether a process has the lock: the file open and, as /proc/<pid>/fdinfo says, the lock on that
// descriptor. Who only reads the file, such as a backup, is no machine.
func holds(pid int, lock unix.Stat_t) bool {
	for _, fd := range lockFDs {
		var st unix.Stat_t
		err := unix.Stat(fmt.Sprintf("/proc/%d/fd/%d", pid, fd), &st)
		if err != nil || st.Dev != lock.Dev || st.Ino != lock.Ino {
			continue
		}
		if info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%d", pid, fd)); err == nil && heldLock.Match(info) {
			return true
		}
	}
	return false
}

var heldLock = regexp.MustCompile(`(?m)^lock:.*\bFLOCK\b`)
