package cli

import (
	"context"
	"errors"
	"os"
	"os/signal"
	"sync"
	"syscall"
)

// Main runs one command line and returns the exit code.
func Main(e *Env) int {
	ctx, cancel := context.WithCancelCause(context.Background())
	defer cancel(nil)
	e.signals = watchSignals(func() { cancel(context.Canceled) })
	defer e.signals.close()
	return Run(ctx, e)
}

// Run is Main without signals. Errors are printed here and nowhere else.
func Run(ctx context.Context, e *Env) int {
	root := newRoot(e)
	root.SetArgs(e.Args)
	root.SetIn(e.Stdin)
	root.SetOut(e.Stdout)
	root.SetErr(e.Stderr)
	err := outputFault(root.ExecuteContext(ctx))
	e.printError(err)
	return exitCode(err)
}

// interrupts hands SIGINT and SIGTERM to whoever wants them now. By default the first one cancels
// the command, which then takes back what it began; from the second one on the signal has its
// ordinary effect.
type interrupts struct {
	signals chan os.Signal
	done    chan struct{}
	once    sync.Once

	mu     sync.Mutex
	handle func(os.Signal) // nil: cancel
}

func watchSignals(cancel func()) *interrupts {
	i := &interrupts{signals: make(chan os.Signal, 4), done: make(chan struct{})}
	signal.Notify(i.signals, syscall.SIGINT, syscall.SIGTERM)
	go i.watch(cancel)
	return i
}

func (i *interrupts) watch(cancel func()) {
	for {
		select {
		case <-i.done:
			return
		case s := <-i.signals:
			i.mu.Lock()
			handle := i.handle
			i.mu.Unlock()
			if handle != nil {
				handle(s)
				continue
			}
			signal.Stop(i.signals)
			cancel()
		}
	}
}

// take makes handle receive the signals until the returned function is called. On a nil receiver
// it does nothing.
func (i *interrupts) take(handle func(os.Signal)) (release func()) {
	if i == nil {
		return func() {}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.handle = handle
	return func() {
		i.mu.Lock()
		defer i.mu.Unlock()
		i.handle = nil
	}
}

// takeSignals gives the signals to handle until release is called; a nil handle drops them.
func (e *Env) takeSignals(handle func(os.Signal)) (release func()) {
	if handle == nil {
		handle = func(os.Signal) {}
	}
	return e.signals.take(handle)
}

func (i *interrupts) close() {
	signal.Stop(i.signals)
	i.once.Do(func() { close(i.done) })
}

// exitError passes a guest program's exit code through. Its text, when there is one, is printed as
// an error of that program.
type exitError struct {
	code int
	text string
}

func (e *exitError) Error() string { return "exit code" }

// silent returns an error that only sets the exit code, or nil for 0.
func silent(code int) error {
	if code == 0 {
		return nil
	}
	return &exitError{code: code}
}

func asExit(err error) *exitError {
	var x *exitError
	if errors.As(err, &x) {
		return x
	}
	return nil
}
