package system

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"banger/internal/fault"
)

// Bounds of Run.
const (
	DefaultTimeout = time.Minute
	MaxStdout      = 16 << 20 // bytes captured; a program that writes more fails
	MaxStderr      = 4 << 10  // bytes kept of the end of stderr
	maxLine        = 4 << 10  // bytes of one stderr line handed on

	// waitDelay is how long output is still read after the program ended or was killed; a
	// grandchild that keeps the pipe open must not hold us up.
	waitDelay = 2 * time.Second
)

// Command is one program to run and wait for.
type Command struct {
	Path         string // absolute, or looked up in PATH
	Args         []string
	Dir          string
	Env          []string      // nil: ours
	Stdin        io.Reader     // nil: /dev/null
	Stdout       io.Writer     // nil: captured and returned
	OnStderrLine func(string)  // called for each line of stderr, from one goroutine; may be nil
	Timeout      time.Duration // 0: DefaultTimeout
}

// ExitError says how a program that ran failed.
type ExitError struct {
	Argv   []string
	Code   int            // exit status; -1 when a signal ended it
	Signal syscall.Signal // 0 when it exited
	Stderr string         // the end of what it wrote there, at most MaxStderr bytes
	reason string
}

// Error returns the command line, how it ended and the end of stderr.
func (e *ExitError) Error() string {
	text := strings.Join(e.Argv, " ") + ": " + e.reason
	if e.Stderr != "" {
		text += ": " + e.Stderr
	}
	return text
}

// Run runs a program to its end, in a process group of its own, which is killed as a whole when ctx
// or the timeout ends. An unsuccessful end is an *ExitError; behind it are a Timeout or an
// Interrupted fault when we ended it. A program that is not there is a Precondition fault.
func Run(ctx context.Context, c Command) ([]byte, error) {
	timeout := c.Timeout
	if timeout == 0 {
		timeout = DefaultTimeout
	}
	runCtx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	cmd := exec.CommandContext(runCtx, c.Path, c.Args...)
	cmd.Dir, cmd.Env, cmd.Stdin = c.Dir, c.Env, c.Stdin
	stdout := &capped{limit: MaxStdout}
	cmd.Stdout = stdout
	if c.Stdout != nil {
		cmd.Stdout = c.Stdout
	}
	stderr := &tail{onLine: c.OnStderrLine}
	cmd.Stderr = stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	cmd.WaitDelay = waitDelay
	if err := cmd.Start(); err != nil {
		return nil, cannotStart(c.Path, err)
	}
	err := cmd.Wait()
	stderr.flush()
	if errors.Is(err, exec.ErrWaitDelay) {
		// The program is gone; what it left behind in its group holds our pipe.
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
	}
	if err == nil && !stdout.overflow {
		return stdout.kept.Bytes(), nil
	}
	return nil, failure(ctx, runCtx, cmd, err, stderr, timeout)
}

func cannotStart(path string, err error) error {
	if errors.Is(err, exec.ErrNotFound) || errors.Is(err, syscall.ENOENT) || errors.Is(err, syscall.EACCES) {
		return fault.Wrap(fault.Precondition, err, "cannot start %s", path).
			WithHint("see whether it is still installed: banger doctor")
	}
	return fault.Wrap(fault.KindOf(err), err, "cannot start %s", path)
}

func failure(ctx, runCtx context.Context, cmd *exec.Cmd, err error, stderr *tail, timeout time.Duration) error {
	e := &ExitError{Argv: cmd.Args, Code: cmd.ProcessState.ExitCode(), Stderr: stderr.String()}
	if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		e.Signal = ws.Signal()
	}
	e.reason = cmd.ProcessState.String()
	var exit *exec.ExitError
	switch {
	case err == nil:
		e.reason = fmt.Sprintf("wrote more than %d bytes to stdout", MaxStdout)
	case !errors.As(err, &exit):
		e.reason = err.Error() // reading or writing its pipes failed
	}
	switch {
	case ctx.Err() == nil && runCtx.Err() != nil:
		return fault.Wrap(fault.Timeout, e, "no end within %s", timeout)
	case ctx.Err() != nil:
		return fault.Wrap(fault.KindOf(ctx.Err()), e, "ended before it was done")
	}
	return e
}

// capped keeps output up to a limit, and remembers that there was more.
type capped struct {
	kept     bytes.Buffer // not embedded: its ReadFrom would pass the limit by
	limit    int
	overflow bool
}

func (c *capped) Write(p []byte) (int, error) {
	room := c.limit - c.kept.Len()
	if len(p) > room {
		c.overflow = true
		c.kept.Write(p[:room])
		return len(p), nil // swallow the rest: the program shall not block on us
	}
	return c.kept.Write(p)
}

// tail keeps the end of stderr and hands on its lines.
type tail struct {
	kept   []byte
	line   []byte
	onLine func(string)
}

func (t *tail) Write(p []byte) (int, error) {
	t.kept = append(t.kept, p[max(0, len(p)-MaxStderr):]...)
	if extra := len(t.kept) - MaxStderr; extra > 0 {
		t.kept = append(t.kept[:0], t.kept[extra:]...)
	}
	if t.onLine == nil {
		return len(p), nil
	}
	for rest := p; len(rest) > 0; {
		line, after, found := bytes.Cut(rest, []byte{'\n'})
		t.line = append(t.line, line[:min(len(line), maxLine-len(t.line))]...)
		if found {
			t.emit()
		}
		rest = after
	}
	return len(p), nil
}

func (t *tail) emit() {
	t.onLine(strings.TrimRight(string(t.line), "\r"))
	t.line = t.line[:0]
}

func (t *tail) flush() {
	if len(t.line) > 0 {
		t.emit()
	}
}

func (t *tail) String() string {
	return strings.TrimSpace(strings.ToValidUTF8(string(t.kept), "?"))
}
