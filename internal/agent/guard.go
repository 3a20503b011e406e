package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"banger/internal/agent/boot"
)

// While the programs of a guest stand still, nobody would start an agent again that dies: whoever does so stands still as
// well. So another process of the agent's waits beside it, at one end of a pipe, and starts the next one. A byte says that
// all is well; the end of the pipe without one, that the agent died.

const (
	// guardReady is the file by which the guard says that it listens.
	guardReady = 3
	// guardWait is how long it may take to.
	guardWait = 10 * time.Second

	// relieveMost is how often the guard looks, each relievePause, whether there is an agent and something stands still. Long
	// before the end of that the host has given up a guest that it cannot tell who it is.
	relieveMost  = 6000
	relievePause = 200 * time.Millisecond
)

// startGuard starts the guard of the agent on that port and returns when it listens. end ends it.
func startGuard(ctx context.Context, port string) (pid int, end func(), err error) {
	theirs, ours, err := os.Pipe()
	if err != nil {
		return 0, nil, err
	}
	defer theirs.Close()
	ready, readyTheirs, err := os.Pipe()
	if err != nil {
		ours.Close()
		return 0, nil, err
	}
	defer ready.Close()
	p, err := startSelf([]*os.File{theirs, os.Stdout, os.Stderr, guardReady: readyTheirs}, "guard", port)
	readyTheirs.Close()
	if err != nil {
		ours.Close()
		return 0, nil, err
	}
	go func() { _, _ = p.Wait() }() // it ends with the pipe
	end = func() {
		_, _ = ours.Write([]byte{0}) // it may have ended
		ours.Close()
	}
	limit := time.Now().Add(guardWait)
	if deadline, ok := ctx.Deadline(); ok && deadline.Before(limit) {
		limit = deadline
	}
	err = ready.SetReadDeadline(limit)
	if err == nil {
		_, err = io.ReadFull(ready, make([]byte, 1))
	}
	if err != nil {
		end()
		return 0, nil, fmt.Errorf("it does not listen: %w", err)
	}
	return p.Pid, end, nil
}

// startSelf starts the agent's program in a session of its own.
func startSelf(files []*os.File, args ...string) (*os.Process, error) {
	return os.StartProcess(boot.AgentPath, append([]string{boot.AgentPath}, args...), &os.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: files, Sys: &syscall.SysProcAttr{Setsid: true},
	})
}

// guard waits for the agent's end.
func guard(port string, in io.Reader, ready io.WriteCloser) error {
	if _, err := ready.Write([]byte{0}); err != nil {
		return err
	}
	if err := ready.Close(); err != nil {
		return err
	}
	_, err := io.ReadFull(in, make([]byte, 1))
	if errors.Is(err, io.EOF) {
		return relieve(port)
	}
	return err
}

// relieve keeps an agent running for as long as something stands still. The first process does that again afterwards, so
// the agent must not be a child of this one: another process starts it.
func relieve(port string) error {
	guest := newGuest()
	var last error
	for range relieveMost {
		holds, err := guest.Holds()
		if !holds && err == nil {
			return nil
		}
		if boot.AgentPID() == 0 {
			last = startAgain(port)
		}
		time.Sleep(relievePause)
	}
	return errors.Join(errors.New("this guest stands still, and nobody has told it who it is"), last)
}

func startAgain(port string) error {
	p, err := startSelf([]*os.File{os.Stdin, os.Stdout, os.Stderr}, "start", port)
	if err != nil {
		return err
	}
	state, err := p.Wait()
	if err == nil && !state.Success() {
		return fmt.Errorf("start the agent: %s", state)
	}
	return err
}
