package boot

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/gofrs/flock"
	"golang.org/x/sys/unix"

	"banger/internal/agent/identity"
)

// installAgent makes the program of the initramfs reachable from the new root. It is mounted, not
// copied: nine megabytes take a fifth of a second under software emulation, and memory for good.
func installAgent() error {
	const target = "/newroot" + agentFile
	if err := os.WriteFile(target, nil, 0o755); err != nil {
		return fmt.Errorf("install the agent: %w", err)
	}
	if err := unix.Mount("/init", target, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("install the agent: %w", err)
	}
	return os.Symlink(agentFile, "/newroot"+AgentPath)
}

const (
	ensureWait = 5 * time.Second
	ensurePoll = 5 * time.Millisecond
)

// EnsureAgent returns the pid of the agent that runs; when there is none it starts one, in a session of its own. Who does so
// at the same time finds the same one.
func EnsureAgent(port string) (pid int, err error) {
	lock, err := lockAgent(Dir)
	if err != nil {
		return 0, fmt.Errorf("start the agent: %w", err)
	}
	defer lock.Close()
	if pid := AgentPID(); pid != 0 {
		return pid, nil
	}
	a, err := startAgent(port)
	if err != nil {
		return 0, err
	}
	return a.pid, a.release()
}

// lockAgent locks the agent's directory for whoever may start one. One that is stopped while it has the lock is waited
// for only so long.
func lockAgent(dir string) (*flock.Flock, error) {
	ctx, cancel := context.WithTimeout(context.Background(), ensureWait)
	defer cancel()
	lock := flock.New(dir, flock.SetFlag(os.O_RDONLY))
	if _, err := lock.TryLockContext(ctx, ensurePoll); err != nil && ctx.Err() == nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, nil
}

// starting is an agent that has been started and does not answer yet.
type starting struct {
	pid  int
	gate *os.File
}

// release lets it answer.
func (a starting) release() error { return a.gate.Close() }

// startAgent starts the agent, which gets itself ready and then waits: its stdin is a pipe that ends when
// it is released, or when its parent does.
func startAgent(port string) (starting, error) {
	wait, gate, err := os.Pipe()
	if err != nil {
		return starting{}, err
	}
	defer wait.Close()
	p, err := os.StartProcess(AgentPath, []string{AgentPath, "serve", port}, &os.ProcAttr{
		Dir: "/", Env: environment(), Files: []*os.File{wait, os.Stdout, os.Stderr},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		gate.Close()
		return starting{}, fmt.Errorf("start the agent: %w", err)
	}
	pid := p.Pid
	_ = p.Release() // nothing to fail: whoever is its parent then reaps it
	return starting{pid, gate}, identity.File("/", strings.TrimPrefix(PIDFile, "/"), strconv.Itoa(pid)+"\n", 0o644)
}

// AwaitRelease waits, in the agent, until it may answer.
func AwaitRelease() error {
	_, err := io.Copy(io.Discard, os.Stdin)
	return err
}

// AgentPID returns the pid of the agent that runs, or 0.
func AgentPID() int {
	b, err := os.ReadFile(PIDFile)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0
	}
	// The pid may be another program's by now.
	theirs, err := os.Stat("/proc/" + strconv.Itoa(pid) + "/exe")
	if err != nil {
		return 0
	}
	ours, err := os.Stat(AgentPath)
	if err != nil || !os.SameFile(theirs, ours) {
		return 0
	}
	return pid
}
