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
// well. So another process of the agent's waits beside it, at one end of a pipe. A byte says that all is well; the end
// of the pipe without one, that the agent died.

// guardWait is how long the guard may take to be there.
const guardWait = 10 * time.Second

// startGuard starts the guard and returns when it listens. end ends it.
func startGuard(ctx context.Context) (end func(), err error) {
	theirs, ours, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	ready, readyTheirs, err := os.Pipe()
	if err != nil {
		ours.Close()
		return nil, err
	}
	defer ready.Close()
	p, err := os.StartProcess(boot.AgentPath, []string{boot.AgentPath, "guard"}, &os.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: []*os.File{theirs, readyTheirs, os.Stderr}, Sys: &syscall.SysProcAttr{Setsid: true},
	})
	readyTheirs.Close()
	if err != nil {
		ours.Close()
		return nil, err
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
		return nil, fmt.Errorf("it does not listen: %w", err)
	}
	return end, nil
}

// guard waits for the agent's end.
func guard(in io.Reader, out io.Writer) error {
	if _, err := out.Write([]byte{0}); err != nil {
		return err
	}
	_, err := io.ReadFull(in, make([]byte, 1))
	if errors.Is(err, io.EOF) {
		return newGuest().Guard()
	}
	return err
}
