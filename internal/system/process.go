package system

import (
	"bytes"
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
)

// StartOptions describe a program that may outlive us.
type StartOptions struct {
	Path       string // absolute, or with a slash
	Args       []string
	Env        []string // nil: ours
	Dir        string
	Log        string     // file for stdout and stderr, emptied, opened for appending, mode 0600; "" is /dev/null
	ErrorLog   string     // file for stderr alone; "" is Log
	Stdin      *os.File   // nil: /dev/null
	ExtraFiles []*os.File // descriptors 3, 4, … of the program
	NewSession bool       // setsid: no terminal's signals reach it

	Confine *Confinement // nil: it may do what we may
	Cgroup  *os.File     // directory of the control group that it starts in; nil: ours
}

// ExitStatus is how a process ended. Only a parent learns it, so Known is false for adopted
// processes of an earlier daemon.
type ExitStatus struct {
	Code   int            // -1 when a signal ended it
	Signal syscall.Signal // 0 when it exited
	Known  bool
}

// String puts the status in words.
func (s ExitStatus) String() string {
	switch {
	case !s.Known:
		return "ended, status unknown"
	case s.Signal != 0:
		return "signal " + s.Signal.String()
	}
	return "exit status " + strconv.Itoa(s.Code)
}

// Process is a running process held by a pidfd, so that a signal can never reach another process
// that got the same number. Waiting for its end costs a goroutine and no wake-ups.
type Process struct {
	pid       int
	startTime uint64
	fd        *os.File // the pidfd
	done      chan struct{}
	status    ExitStatus // valid once done is closed
}

// Start starts a program. It does not wait for it.
func Start(o StartOptions) (*Process, error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", o.Path, err)
	}
	defer null.Close()
	out, err := openLog(o, o.Log, null)
	if err != nil {
		return nil, err
	}
	defer out.Close()
	errs, err := openLog(o, o.ErrorLog, out)
	if err != nil {
		return nil, err
	}
	defer errs.Close()
	keepDescriptors()
	in := null
	if o.Stdin != nil {
		in = o.Stdin
	}
	p, err := o.spawn(in, out, errs)
	if err != nil {
		return nil, cannotStart(o.Path, err)
	}
	pid := p.Pid
	// Nobody but watch reaps it, so the number cannot have been given to another process yet.
	process, err := hold(pid)
	if err == nil && o.Confine != nil {
		if err = o.Confine.limit(pid); err != nil {
			_ = process.Close()
		}
	}
	if err != nil {
		_ = p.Kill()
		_, _ = p.Wait()
		return nil, err
	}
	_ = p.Release()
	go process.watch()
	return process, nil
}

// spawn starts the program with those as its first three descriptors.
func (o StartOptions) spawn(in, out, errs *os.File) (*os.Process, error) {
	attr := &os.ProcAttr{
		Dir: o.Dir, Env: o.Env,
		Files: append([]*os.File{in, out, errs}, o.ExtraFiles...),
		Sys:   &syscall.SysProcAttr{Setsid: o.NewSession},
	}
	if o.Cgroup != nil {
		attr.Sys.UseCgroupFD, attr.Sys.CgroupFD = true, int(o.Cgroup.Fd())
	}
	begin := func() (*os.Process, error) {
		return os.StartProcess(o.Path, append([]string{o.Path}, o.Args...), attr)
	}
	if o.Confine == nil {
		return begin()
	}
	return o.Confine.start(begin)
}

// openLog opens a log of the program's; without a name it is the other file.
func openLog(o StartOptions, name string, other *os.File) (*os.File, error) {
	if name == "" {
		return other, nil
	}
	f, err := os.OpenFile(name, os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot open the log for %s", o.Path)
	}
	return f, nil
}

// keepDescriptors keeps what we inherited without close-on-exec from a program that outlives us; Go's
// own descriptors have the mark already. Kernels before 5.11 lack the call: then there is no harm
// but an open file more in the program.
func keepDescriptors() {
	_ = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_CLOEXEC)
}

// Adopt takes hold of the process with this pid and start time, as told by an earlier Process. A
// NotFound fault says that it has ended, also when another process has its number now.
func Adopt(pid int, startTime uint64) (*Process, error) {
	gone := fault.New(fault.NotFound, "process %d started at tick %d is gone", pid, startTime)
	if pid <= 0 {
		return nil, gone
	}
	p, err := hold(pid)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, os.ErrNotExist) {
		return nil, gone
	}
	if err != nil {
		return nil, err
	}
	if p.startTime != startTime {
		p.fd.Close()
		return nil, gone
	}
	if p.ended() {
		reap(int(p.fd.Fd()), pid) // a child of ours that nobody waited for
		p.fd.Close()
		return nil, gone
	}
	go p.watch()
	return p, nil
}

// hold opens the pidfd before it reads the start time: what was read then belongs to the pidfd's
// process, or the pidfd says that this one has ended.
func hold(pid int) (*Process, error) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("pidfd of process %d: %w", pid, err)
	}
	// Non-blocking, so that the runtime's poller takes it.
	if err := unix.SetNonblock(fd, true); err != nil {
		unix.Close(fd)
		return nil, fmt.Errorf("pidfd of process %d: %w", pid, err)
	}
	started, err := StartTime(pid)
	if err != nil {
		unix.Close(fd)
		return nil, err
	}
	return &Process{
		pid: pid, startTime: started, fd: os.NewFile(uintptr(fd), "pidfd"), done: make(chan struct{}),
	}, nil
}

// StartTime returns when process pid started, in clock ticks since boot: field 22 of
// /proc/<pid>/stat (proc_pid_stat(5)).
func StartTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	return parseStartTime(stat)
}

func parseStartTime(stat []byte) (uint64, error) {
	// Field 2, the name in parentheses, may hold anything, also spaces and parentheses.
	end := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[end+1:]))
	const afterName = 22 - 3 // the first field after the name is number 3
	if end < 0 || len(fields) <= afterName {
		return 0, fmt.Errorf("unexpected /proc/<pid>/stat: %q", stat)
	}
	return strconv.ParseUint(fields[afterName], 10, 64)
}

// watch waits for the end of the process or for Close.
func (p *Process) watch() {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return // Close came first
	}
	err = conn.Read(func(fd uintptr) bool {
		if !readable(int(fd)) {
			return false
		}
		p.status = reap(int(fd), p.pid)
		return true
	})
	if err != nil {
		return // Close
	}
	p.fd.Close()
	close(p.done)
}

// ended tells whether the process is a zombie or gone. It works while nobody watches.
func (p *Process) ended() bool {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return true
	}
	var over bool
	return conn.Control(func(fd uintptr) { over = readable(int(fd)) }) != nil || over
}

// readable tells whether a pidfd's process has ended (pidfd_open(2)).
func readable(fd int) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, unix.EINTR) {
			return n > 0
		}
	}
}

// reap collects the exit status of an ended process when it is a child of ours.
func reap(fd, pid int) ExitStatus {
	// Asking by pidfd first makes sure that the number means the same process below.
	if err := unix.Waitid(unix.P_PIDFD, fd, nil, unix.WEXITED|unix.WNOHANG|unix.WNOWAIT, nil); err != nil {
		return ExitStatus{}
	}
	var ws unix.WaitStatus
	if got, err := unix.Wait4(pid, &ws, unix.WNOHANG, nil); err != nil || got != pid {
		return ExitStatus{}
	}
	status := ExitStatus{Code: ws.ExitStatus(), Known: true}
	if ws.Signaled() {
		status.Signal = syscall.Signal(ws.Signal())
	}
	return status
}

// PID returns the process's number.
func (p *Process) PID() int { return p.pid }

// StartTime returns when the process started, in clock ticks since boot; with the pid it names the
// process for the time this host is up.
func (p *Process) StartTime() uint64 { return p.startTime }

// Done is closed when the process has ended; after Close it stays as it is.
func (p *Process) Done() <-chan struct{} { return p.done }

// Status is how it ended; valid once Done is closed.
func (p *Process) Status() ExitStatus {
	select {
	case <-p.done:
		return p.status
	default:
		return ExitStatus{}
	}
}

// Signal sends a signal; os.ErrProcessDone when the process has ended or was let go.
func (p *Process) Signal(sig syscall.Signal) error {
	conn, err := p.fd.SyscallConn()
	if err != nil {
		return os.ErrProcessDone
	}
	var sendErr error
	err = conn.Control(func(fd uintptr) { sendErr = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	if err != nil || errors.Is(sendErr, unix.ESRCH) {
		return os.ErrProcessDone
	}
	return sendErr
}

// Close lets go of the process without touching it.
func (p *Process) Close() error {
	if err := p.fd.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
