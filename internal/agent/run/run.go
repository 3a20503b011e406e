// Package run runs programs in the guest: as a user, in a login environment, with or without a
// pseudo-terminal. It holds the guest's key to os/exec.
package run

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"banger/internal/agent/serve"
)

const (
	hangUpGrace = 2 * time.Second // between SIGHUP and SIGKILL when the caller has gone
	// drainGrace is how long an output may stay silent after the program's end before it is taken
	// to be held open by something the program left behind.
	drainGrace = 300 * time.Millisecond
	pipeSize   = 64 << 10 // bytes that a pipe holds, as pipe(7) says

	notFound      = 127
	notExecutable = 126
)

// Runner runs programs on this machine.
type Runner struct {
	// Root is where /etc/passwd and its like are read; "/" in a guest.
	Root string
	// Group opens the control group in which programs are started; nil, or a nil file, is the runner's own.
	Group func() (*os.File, error)
	// Starting is locked for the moment of a start; nil: there is nothing to heed.
	Starting sync.Locker
}

var _ serve.Runner = Runner{}

// Run runs p to its end.
func (r Runner) Run(ctx context.Context, p serve.Program) serve.Exit {
	cmd, err := r.command(p)
	if err != nil {
		return failure(err)
	}
	s := &session{cmd: cmd, p: p, starting: r.Starting}
	defer s.closeAll()
	if err := s.enter(r.Group); err != nil {
		return failure(err)
	}
	if p.Terminal != nil {
		err = s.openTerminal()
	} else {
		err = s.openPipes()
	}
	if err != nil {
		return failure(err)
	}
	if err := r.start(ctx, cmd); err != nil {
		return failure(err)
	}
	s.closeTheirs()
	if p.Started != nil {
		p.Started(cmd.Process.Pid)
	}
	return s.wait(ctx)
}

// start starts a program as soon as it may be, unless its caller has gone meanwhile.
func (r Runner) start(ctx context.Context, cmd *exec.Cmd) error {
	if r.Starting != nil {
		r.Starting.Lock()
		defer r.Starting.Unlock()
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	return cmd.Start()
}

// failure is the exit of a program that could not be started.
func failure(err error) serve.Exit {
	code := notExecutable
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, fs.ErrNotExist) {
		code = notFound
	}
	return serve.Exit{Code: code, Error: err.Error()}
}

// session is a program that runs: our ends of its pipes, and the process.
type session struct {
	cmd *exec.Cmd
	p   serve.Program
	// starting is the runner's.
	starting sync.Locker

	theirs []*os.File // closed once the program has them
	ours   []*os.File
	master *os.File // of the terminal, or nil
	stdin  *os.File // write end, or nil
	drains []*drain
}

// enter has the program start in the group.
func (s *session) enter(open func() (*os.File, error)) error {
	if open == nil {
		return nil
	}
	group, err := open()
	if group == nil || err != nil {
		return err
	}
	s.theirs = append(s.theirs, group)
	s.cmd.SysProcAttr.UseCgroupFD, s.cmd.SysProcAttr.CgroupFD = true, int(group.Fd())
	return nil
}

func (s *session) openPipes() error {
	s.cmd.SysProcAttr.Setpgid = true
	if s.p.Stdin != nil {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		s.cmd.Stdin, s.stdin = r, w
		s.theirs, s.ours = append(s.theirs, r), append(s.ours, w)
	}
	for _, out := range []struct {
		to    io.Writer
		field *io.Writer
	}{{s.p.Stdout, &s.cmd.Stdout}, {s.p.Stderr, &s.cmd.Stderr}} {
		r, w, err := os.Pipe()
		if err != nil {
			return err
		}
		*out.field = w
		s.theirs, s.ours = append(s.theirs, w), append(s.ours, r)
		s.drains = append(s.drains, &drain{from: r, to: out.to})
	}
	return nil
}

func (s *session) openTerminal() error {
	master, slave, err := openTerminal(*s.p.Terminal)
	if err != nil {
		return err
	}
	s.master = master
	s.theirs, s.ours = append(s.theirs, slave), append(s.ours, master)
	if s.p.Stdin != nil {
		s.stdin = master
	}
	s.cmd.Stdin, s.cmd.Stdout, s.cmd.Stderr = slave, slave, slave
	s.cmd.SysProcAttr.Setsid, s.cmd.SysProcAttr.Setctty = true, true
	s.drains = []*drain{{from: master, to: s.p.Stdout}}
	if cred := s.cmd.SysProcAttr.Credential; cred != nil {
		return slave.Chown(int(cred.Uid), -1)
	}
	return nil
}

func (s *session) closeTheirs() {
	for _, f := range s.theirs {
		f.Close()
	}
	s.theirs = nil
}

func (s *session) closeAll() {
	s.closeTheirs()
	for _, f := range s.ours {
		f.Close() // a second close of stdin is harmless
	}
}

// wait serves the program until it has ended and its output is written.
func (s *session) wait(ctx context.Context) serve.Exit {
	var drained sync.WaitGroup
	for _, d := range s.drains {
		drained.Go(d.run)
	}
	if s.stdin != nil {
		go s.feed() // ends with ctx, or when the pipe is closed
	}
	exited := make(chan struct{})
	var attendants sync.WaitGroup
	attendants.Go(func() { s.attend(ctx, exited) })
	_ = s.cmd.Wait() // ProcessState tells more
	close(exited)
	for _, d := range s.drains {
		d.finish()
	}
	drained.Wait()
	attendants.Wait()
	return exitOf(s.cmd.ProcessState)
}

func exitOf(state *os.ProcessState) serve.Exit {
	if w, ok := state.Sys().(syscall.WaitStatus); ok && w.Signaled() {
		return serve.Exit{Code: 128 + int(w.Signal()), Signal: w.Signal()}
	}
	return serve.Exit{Code: state.ExitCode()}
}

// feed copies the caller's input. On a terminal its end is the end-of-file character.
func (s *session) feed() {
	_, err := io.Copy(s.stdin, s.p.Stdin)
	if s.master == nil {
		s.stdin.Close()
		return
	}
	if err == nil {
		const endOfFile = 4
		_, _ = s.master.Write([]byte{endOfFile}) // a program that has gone needs no end
	}
}

// attend passes signals and sizes on, and ends the program when the caller has gone.
func (s *session) attend(ctx context.Context, exited <-chan struct{}) {
	for {
		select {
		case <-exited:
			return
		case sig := <-s.p.Signals:
			s.signal(sig)
		case to := <-s.p.Resize:
			if s.master != nil {
				_ = resize(s.master, to) // cosmetic
			}
		case <-ctx.Done():
			s.hangUp(exited)
			return
		}
	}
}

// signal signals the program's group; it may have ended.
func (s *session) signal(sig syscall.Signal) {
	_ = syscall.Kill(-s.cmd.Process.Pid, sig)
}

// runs is closed as soon as programs run.
func (s *session) runs() <-chan struct{} {
	yes := make(chan struct{})
	if s.starting == nil {
		close(yes)
		return yes
	}
	go func() { // ends when they do
		s.starting.Lock()
		defer s.starting.Unlock()
		close(yes)
	}()
	return yes
}

func (s *session) hangUp(exited <-chan struct{}) {
	s.signal(syscall.SIGHUP)
	s.signal(syscall.SIGCONT)
	select { // a program that stands still hears of it when it runs on, but would be killed at once
	case <-exited:
	case <-s.runs():
	}
	grace := time.NewTimer(hangUpGrace)
	defer grace.Stop()
	select {
	case <-exited:
	case <-grace.C:
		s.signal(syscall.SIGKILL)
		<-exited
	}
	for _, d := range s.drains {
		d.abandon()
	}
}

// drain copies one output until its end. After the program has ended, it takes what is there.
type drain struct {
	from  *os.File
	to    io.Writer
	ended atomic.Bool
}

func (d *drain) run() {
	buf := make([]byte, pipeSize)
	for {
		if d.ended.Load() {
			_ = d.from.SetReadDeadline(time.Now().Add(drainGrace)) // fails once abandoned; so does Read
		}
		n, err := d.from.Read(buf)
		if errors.Is(err, os.ErrDeadlineExceeded) {
			n, err = d.present(buf, err) // the time may have been over before the read began, on a slow machine
		}
		if n > 0 && d.to != nil {
			if _, werr := d.to.Write(buf[:n]); werr != nil {
				d.to = nil // nobody listens; the program must not block for it
			}
		}
		if err != nil {
			return // the end, the deadline, or EIO of a terminal that nobody holds
		}
	}
}

// present reads what is there, without waiting; it returns none, the error why, when that is nothing.
func (d *drain) present(buf []byte, none error) (n int, err error) {
	_ = d.from.SetReadDeadline(time.Time{}) // fails once abandoned; so does SyscallConn
	conn, err := d.from.SyscallConn()
	if err != nil {
		return 0, err
	}
	if rerr := conn.Read(func(fd uintptr) bool { n, err = syscall.Read(int(fd), buf); return true }); rerr != nil {
		return 0, rerr
	}
	if err != nil || n == 0 {
		return 0, none
	}
	return n, nil
}

// finish tells the drain that the program has ended.
func (d *drain) finish() {
	d.ended.Store(true)
	_ = d.from.SetReadDeadline(time.Now().Add(drainGrace)) // fails once abandoned
}

func (d *drain) abandon() { _ = d.from.Close() }

// Output runs a helper program of the guest's and returns its stdout, at most a megabyte of it. A
// failed program's output is returned beside the error.
func Output(ctx context.Context, timeout time.Duration, argv ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.WaitDelay = time.Second
	out := &limited{max: 1 << 20}
	cmd.Stdout = out
	err := cmd.Run()
	return out.b, err
}

// limited keeps the first max bytes.
type limited struct {
	b   []byte
	max int
}

func (l *limited) Write(p []byte) (int, error) {
	l.b = append(l.b, p[:min(len(p), l.max-len(l.b))]...)
	return len(p), nil
}
