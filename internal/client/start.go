package client

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/build"
	"banger/internal/daemon/lock"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/system"
)

// Limits on how long the daemon may take.
const (
	startTimeout = 30 * time.Second // from exec to its first answer, on a host that is busy; one that ends is seen at once
	graceTimeout = 3 * time.Second  // to answer again when it lives but has no socket
	stopTimeout  = 15 * time.Second // from being asked to end to its end
	killTimeout  = 3 * time.Second  // the same for one that does not answer, before it is killed
	tailBytes    = 4 << 10          // of a dead daemon's output that go into the error
)

// absent tells whether err says that nobody listens.
func absent(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ECONNREFUSED)
}

// takeTurn waits until no other client starts a daemon of p; the caller's turn ends when it closes what is returned.
func takeTurn(ctx context.Context, p paths.Paths) (*flock.Flock, error) {
	if err := p.Make(); err != nil {
		return nil, err
	}
	turn := flock.New(p.StartLock(), flock.SetPermissions(0o600))
	waiting, cancel := context.WithTimeout(ctx, startTimeout+stopTimeout)
	defer cancel()
	_, err := turn.TryLockContext(waiting, 20*time.Millisecond)
	switch {
	case err == nil:
		return turn, nil
	case ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded):
		return nil, fault.New(fault.Timeout, "another banger has been starting the daemon for %s", startTimeout+stopTimeout).
			WithHint("see %s", p.DaemonLog())
	}
	return nil, err
}

// ensureDaemon brings about a daemon of this build. One client does so at a time; the others find
// it done when their turn comes.
func (c *Client) ensureDaemon(ctx context.Context, o Options) error {
	turn, err := takeTurn(ctx, o.Paths)
	if err != nil {
		return err
	}
	defer turn.Close()

	err = c.greet(ctx)
	switch {
	case c.usable(err):
		return nil
	case err == nil:
		return c.replace(ctx, o)
	case absent(err):
		if back, err := c.awaitHolder(ctx, o.Paths); back || err != nil {
			return err
		}
		return c.start(ctx, o)
	}
	return err
}

// replace ends a daemon of another build and starts this build's.
func (c *Client) replace(ctx context.Context, o Options) error {
	command, err := o.command()
	if err != nil {
		return err
	}
	// When only banger was built anew, starting the bangerd beside it would change nothing, every time.
	if theirs := buildOf(ctx, command, o.Env); theirs != "" && theirs != build.ID() {
		o.notice("bangerd is build " + theirs + ", this banger is " + build.ID() + ": build and install both")
		return nil
	}
	old := c.Hello.Build
	if err := c.exchange(ctx, o, command[0]); err != nil {
		return err
	}
	o.notice("bangerd was build " + old + ", restarted as " + c.Hello.Build)
	return nil
}

// exchange has the daemon end and one of program start, which answers then.
func (c *Client) exchange(ctx context.Context, o Options, program string) error {
	if !runsInUnit(o.Paths, program) {
		if err := c.end(ctx, o.Paths, false); err != nil {
			return err
		}
		return c.start(ctx, o)
	}
	if err := restartUnit(ctx, o); err != nil {
		return err
	}
	c.http.CloseIdleConnections()
	return c.greet(ctx)
}

// ownStart is the environment of a daemon that we start, given ours (nil: the process's): without the address of a service manager
// that waits for us.
func ownStart(env []string) []string {
	if env == nil {
		env = os.Environ()
	}
	return slices.DeleteFunc(slices.Clone(env), func(e string) bool { return strings.HasPrefix(e, "NOTIFY_SOCKET=") })
}

// buildOf asks a bangerd binary which build it is; "" when it does not say.
func buildOf(ctx context.Context, command, env []string) string {
	args := append(command[1:len(command):len(command)], "--version")
	out, err := system.Run(ctx, system.Command{Path: command[0], Args: args, Env: env, Timeout: 5 * time.Second})
	if err != nil {
		return ""
	}
	_, id, _ := strings.Cut(strings.TrimSpace(string(out)), "bangerd ")
	return id
}

// awaitHolder deals with a daemon that lives but cannot be reached, since its socket is gone or
// not there yet: it gets a moment, then is ended. back tells that it answers again.
func (c *Client) awaitHolder(ctx context.Context, p paths.Paths) (back bool, err error) {
	_, proc := holder(p)
	if proc == nil {
		return false, nil
	}
	defer proc.Close()
	err = c.awaitHello(ctx, proc, graceTimeout)
	switch {
	case err == nil && c.usable(nil):
		return true, nil
	case ctx.Err() != nil:
		return false, ctx.Err()
	case exited(proc):
		return false, nil
	}
	if err := proc.Signal(syscall.SIGTERM); err != nil && !exited(proc) {
		return false, fault.Wrap(fault.Precondition, err, "cannot end the daemon (pid %d) that lost its socket", proc.PID())
	}
	return false, awaitEnd(ctx, proc, p, stopTimeout)
}

// holder returns the daemon that the lock file names, when that process still runs; else nil.
func holder(p paths.Paths) (lock.Holder, *system.Process) {
	h, err := lock.Read(p.Lock())
	if err != nil {
		return h, nil
	}
	proc, err := system.Adopt(h.PID, h.StartTime)
	if err != nil {
		return h, nil
	}
	return h, proc
}

func exited(proc *system.Process) bool {
	select {
	case <-proc.Done():
		return true
	default:
		return false
	}
}

func awaitEnd(ctx context.Context, proc *system.Process, p paths.Paths, limit time.Duration) error {
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-proc.Done():
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-timer.C:
		return notAnswering(p)
	}
}

// end asks the daemon to end and waits until it has. With insist, one that does not is killed:
// VMs live on, and the next daemon adopts them.
func (c *Client) end(ctx context.Context, p paths.Paths, insist bool) error {
	_, proc := holder(p)
	asking, cancel := context.WithTimeout(ctx, helloTimeout)
	_, err := c.Daemon.Shutdown(asking, &bangerv1.ShutdownRequest{})
	cancel()
	c.http.CloseIdleConnections()
	if proc == nil {
		return err
	}
	defer proc.Close()
	limit := stopTimeout
	if err != nil && !exited(proc) {
		if insist {
			limit = killTimeout
		}
		if err := proc.Signal(syscall.SIGTERM); err != nil && !exited(proc) {
			return fault.Wrap(fault.Precondition, err, "cannot end the daemon (pid %d)", proc.PID())
		}
	}
	err = awaitEnd(ctx, proc, p, limit)
	if err == nil || !insist || ctx.Err() != nil {
		return err
	}
	if err := proc.Signal(syscall.SIGKILL); err != nil && !exited(proc) {
		return fault.Wrap(fault.Precondition, err, "cannot kill the daemon (pid %d)", proc.PID())
	}
	return awaitEnd(ctx, proc, p, stopTimeout)
}

// Stop ends the daemon of p, insisting when it does not answer; VMs run on. It tells whether there was one.
func Stop(ctx context.Context, p paths.Paths) (bool, error) {
	c := connectTo(p.Socket())
	defer c.Close()
	_, proc := holder(p)
	if proc == nil {
		if err := c.greet(ctx); err != nil {
			return false, nil // nobody there
		}
	} else {
		_ = proc.Close()
	}
	if err := c.end(ctx, p, true); err != nil {
		return true, explain(err, p)
	}
	return true, nil
}

func (o Options) notice(text string) {
	if o.Notice != nil {
		o.Notice(text)
	}
}

// command returns the argv that starts the daemon.
func (o Options) command() ([]string, error) {
	if len(o.Command) > 0 {
		return o.Command, nil
	}
	if self, err := os.Executable(); err == nil {
		beside := filepath.Join(filepath.Dir(self), "bangerd")
		if info, err := os.Stat(beside); err == nil && info.Mode().IsRegular() {
			return []string{beside}, nil
		}
	}
	path, err := system.Find("bangerd", "")
	if err != nil {
		return nil, fault.New(fault.Precondition, "cannot find the program bangerd").
			WithHint("it belongs beside banger or in PATH; make install puts both in place")
	}
	return []string{path}, nil
}

// start starts the daemon and waits until it answers. When it dies instead, the end of its log is
// in the error.
func (c *Client) start(ctx context.Context, o Options) error {
	command, err := o.command()
	if err != nil {
		return err
	}
	out := o.Paths.DaemonOutput()
	if size(out) > 0 {
		_ = os.Rename(out, out+".1") // the trace of a crash is kept for one more run, if it can be
	}
	proc, err := system.Start(system.StartOptions{
		Path: command[0], Args: command[1:], Env: ownStart(o.Env), Dir: "/", Log: out, NewSession: true,
	})
	if err != nil {
		return err
	}
	defer proc.Close()
	err = c.awaitHello(ctx, proc, startTimeout)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case exited(proc):
		return fault.New(fault.Precondition, "the daemon ended right after its start (%s)%s",
			proc.Status(), tail(out)).WithHint("its log is %s", o.Paths.DaemonLog())
	}
	return fault.New(fault.Timeout, "the daemon (pid %d) did not answer within %s of its start%s",
		proc.PID(), startTimeout, tail(out)).WithHint("its log is %s", o.Paths.DaemonLog())
}

// awaitHello greets the daemon until it answers, ends, or limit is over.
func (c *Client) awaitHello(ctx context.Context, proc *system.Process, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	pause := 5 * time.Millisecond
	for {
		err := c.greet(ctx)
		if err == nil || exited(proc) {
			return err
		}
		select {
		case <-ctx.Done():
			return err
		case <-proc.Done(): // once more: it may have found another daemon in its place
		case <-time.After(pause):
			pause = min(2*pause, 100*time.Millisecond)
		}
	}
}

func size(path string) int64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	return info.Size()
}

// tail returns the end of a file, at most tailBytes of it, as a text to append to an error.
func tail(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	data, err := io.ReadAll(io.NewSectionReader(f, max(0, size(path)-tailBytes), tailBytes))
	data = bytes.TrimSpace(data)
	if err != nil || len(data) == 0 {
		return ""
	}
	return ":\n" + string(data)
}
