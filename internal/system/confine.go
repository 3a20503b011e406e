package system

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	landlock "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
)

// Confinement is all that a program may still do to files; and it gains no rights by programs that it starts, makes
// and takes no TCP connections, and signals nobody. It holds for the program and all it starts, for good, as far as
// this kernel has Landlock: see Confines. Names that are not there are left out.
type Confinement struct {
	Execute []string // programs, and directories of their libraries: to read and execute
	Read    []string // files, and directories with all below them
	Write   []string // the same, to read and write; in directories also to make and remove
	Devices []string // to read, write and control

	Limits map[int]uint64 // resource limits: RLIMIT_NOFILE and others to a number; never more than ours
}

// Rights to files (landlock(7)); what concerns directories cannot be given for anything else.
const (
	rightsRead    = landlock.AccessFSReadFile | landlock.AccessFSReadDir
	rightsExecute = rightsRead | landlock.AccessFSExecute
	rightsFile    = landlock.AccessFSReadFile | landlock.AccessFSWriteFile | landlock.AccessFSTruncate
	rightsDevice  = landlock.AccessFSReadFile | landlock.AccessFSWriteFile | landlock.AccessFSIoctlDev
	rightsWrite   = rightsRead | rightsFile | landlock.AccessFSRemoveFile | landlock.AccessFSRemoveDir |
		landlock.AccessFSMakeReg | landlock.AccessFSMakeDir | landlock.AccessFSMakeSock | landlock.AccessFSMakeFifo
	rightsOfFiles = rightsFile | rightsDevice | landlock.AccessFSExecute
)

// Confines tells whether this kernel confines what programs do to files.
func Confines() bool {
	version, err := landlock.LandlockGetABIVersion()
	return err == nil && version >= 1
}

// attributes are what the kernel's version of Landlock can take from a program.
func attributes(version int) landlock.RulesetAttr {
	a := landlock.RulesetAttr{HandledAccessFS: landlock.AccessFSRefer - 1}
	if version >= 2 {
		a.HandledAccessFS |= landlock.AccessFSRefer
	}
	if version >= 3 {
		a.HandledAccessFS |= landlock.AccessFSTruncate
	}
	if version >= 4 {
		a.HandledAccessNet = landlock.AccessNetBindTCP | landlock.AccessNetConnectTCP
	}
	if version >= 5 {
		a.HandledAccessFS |= landlock.AccessFSIoctlDev
	}
	if version >= 6 {
		a.Scoped = landlock.ScopeAbstractUnixSocket | landlock.ScopeSignal
	}
	return a
}

// ruleset makes the kernel's form of c; nil where it has no Landlock.
func (c *Confinement) ruleset() (*os.File, error) {
	version, err := landlock.LandlockGetABIVersion()
	if err != nil || version < 1 {
		return nil, nil
	}
	a := attributes(version)
	fd, err := landlock.LandlockCreateRuleset(&a, 0)
	if err != nil {
		return nil, fmt.Errorf("make a Landlock ruleset: %w", err)
	}
	rules := os.NewFile(uintptr(fd), "landlock")
	for _, group := range []struct {
		rights uint64
		paths  []string
	}{{rightsExecute, c.Execute}, {rightsRead, c.Read}, {rightsWrite, c.Write}, {rightsDevice, c.Devices}} {
		for _, path := range group.paths {
			if err := allow(fd, path, group.rights&a.HandledAccessFS); err != nil {
				rules.Close()
				return nil, fmt.Errorf("let a program use %s: %w", path, err)
			}
		}
	}
	return rules, nil
}

func allow(rules int, path string, rights uint64) error {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var info unix.Stat_t
	if err := unix.Fstat(fd, &info); err != nil {
		return err
	}
	if info.Mode&unix.S_IFMT != unix.S_IFDIR {
		rights &= rightsOfFiles
	}
	return landlock.LandlockAddPathBeneathRule(rules, &landlock.PathBeneathAttr{ParentFd: fd, AllowedAccess: rights}, 0)
}

// start runs begin, which starts a process, on a thread that is confined and serves nothing else any more: what a
// thread has given up its children have, too.
func (c *Confinement) start(begin func() (*os.Process, error)) (*os.Process, error) {
	rules, err := c.ruleset()
	if err != nil {
		return nil, err
	}
	if rules != nil {
		defer rules.Close()
	}
	var p *os.Process
	onOwnThread(func() {
		if err = giveUp(rules); err == nil {
			p, err = begin()
		}
	})
	return p, err
}

// onOwnThread runs do on a thread that ends with it, and waits. It is never the main thread, which cannot end, and for
// which the process is taken in /proc.
func onOwnThread(do func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			onOwnThread(do) // on another one, as this one is locked
			runtime.UnlockOSThread()
			return
		}
		do() // still locked at the end: the thread goes with the goroutine
	}()
	<-done
}

// giveUp confines the calling thread alone.
func giveUp(rules *os.File) error {
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return fmt.Errorf("give up new privileges: %w", err)
	}
	if rules == nil {
		return nil
	}
	if err := landlock.LandlockRestrictSelf(int(rules.Fd()), 0); err != nil {
		return fmt.Errorf("give up files: %w", err)
	}
	return nil
}

// limit sets the resource limits of a process that has just been started.
func (c *Confinement) limit(pid int) error {
	for resource, most := range c.Limits {
		var now unix.Rlimit
		if err := unix.Prlimit(pid, resource, nil, &now); err != nil {
			return fmt.Errorf("read the limits of process %d: %w", pid, err)
		}
		now.Max = min(now.Max, most)
		now.Cur = now.Max
		if err := unix.Prlimit(pid, resource, &now, nil); err != nil {
			return fmt.Errorf("limit process %d: %w", pid, err)
		}
	}
	return nil
}
