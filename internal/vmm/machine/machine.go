// Package machine is what drivers share whose machines are one process each: the Running around
// that process, the lock that the process holds on the machine's directory, and the end of a log.
package machine

import (
	"context"
	"encoding/json"
	"errors"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"banger/internal/channel"
	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
)

// Bounds of Stop's ladder.
const (
	termGrace = 2 * time.Second
	killGrace = 5 * time.Second
	// explainGrace is how long a broken channel waits for the news that the machine has ended.
	explainGrace = 500 * time.Millisecond
)

// Step is one way of asking a VMM to end, gentler than SIGTERM.
type Step struct {
	Do    func(context.Context) error
	Grace time.Duration // how long the process may take after it
}

// Options describe a machine whose process runs.
type Options struct {
	Dir         string
	Process     *system.Process
	Extra       json.RawMessage                                       // for the handle
	Dial        func(context.Context) (net.Conn, error)               // the pipe of the guest channel
	Streams     func(context.Context) (net.Conn, error)               // in its place: each call a stream of its own to the agent
	Sockets     []string                                              // files in Dir, removed at the end
	Ask         *Step                                                 // nil: Stop begins with SIGTERM
	Classify    func(status system.ExitStatus, stopped bool) vmm.Exit // called once, after the end
	PowerButton func(context.Context) error
	Release     func() // ends the driver's own connections and goroutines; called once
}

// opener opens streams to the agent; Close ends them all.
type opener interface {
	Open(context.Context) (net.Conn, error)
	Close() error
}

// Machine is a vmm.Running.
type Machine struct {
	o        Options
	host     opener
	alive    context.Context // ends with the machine, or with Close
	end      context.CancelFunc
	stopping atomic.Bool
	closed   atomic.Bool
	release  sync.Once
	watcher  sync.WaitGroup
	done     chan struct{}
	exit     vmm.Exit // valid once done is closed
}

var (
	_ vmm.Running = (*Machine)(nil)
	_ vmm.Speaker = (*Machine)(nil)
)

// New returns the Running of a process; both are the Machine's from now on.
func New(o Options) *Machine {
	m := &Machine{o: o, done: make(chan struct{})}
	if o.Streams != nil {
		m.host = &streams{open: o.Streams, live: map[*stream]bool{}}
	} else {
		m.host = channel.NewHost(o.Dial)
	}
	m.alive, m.end = context.WithCancel(context.Background())
	m.watcher.Go(m.watch)
	return m
}

// watch waits for the end of the process or for Close.
func (m *Machine) watch() {
	select {
	case <-m.o.Process.Done():
	case <-m.alive.Done():
		return
	}
	m.exit = m.o.Classify(m.o.Process.Status(), m.stopping.Load())
	RemoveIfUnlocked(m.o.Dir, m.o.Sockets)
	m.letGo()
	close(m.done)
}

func (m *Machine) letGo() {
	m.release.Do(func() {
		m.end()
		_ = m.host.Close() // its streams are dead or unwanted: nothing to learn from the error
		if m.o.Release != nil {
			m.o.Release()
		}
	})
}

// Handle names the process.
func (m *Machine) Handle() vmm.Handle {
	return vmm.Handle{PID: m.o.Process.PID(), StartTime: m.o.Process.StartTime(), Extra: m.o.Extra}
}

var errLetGo = fault.New(fault.Conflict, "the machine was let go by this daemon")

// DialGuest opens a stream to the agent. A Conflict fault says that the machine has ended.
func (m *Machine) DialGuest(ctx context.Context) (net.Conn, error) {
	ctx, cancel := m.whileAlive(ctx)
	defer cancel()
	conn, err := m.host.Open(ctx)
	return conn, m.explain(ctx, err)
}

// SayGuest says a word to the agent, where the channel has words.
func (m *Machine) SayGuest(ctx context.Context, kind byte, question []byte) (code byte, answer []byte, err error) {
	host, ok := m.host.(*channel.Host)
	if !ok {
		return 0, nil, channel.ErrMute
	}
	ctx, cancel := m.whileAlive(ctx)
	defer cancel()
	code, answer, err = host.Say(ctx, kind, question)
	return code, answer, m.explain(ctx, err)
}

// whileAlive is ctx, which ends with the machine as well.
func (m *Machine) whileAlive(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	stop := context.AfterFunc(m.alive, cancel)
	return ctx, func() { stop(); cancel() }
}

// explain says of a channel that broke with its machine how that ended.
func (m *Machine) explain(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if ctx.Err() == nil {
		// A pipe that breaks means as a rule that the process is ending: say that instead.
		select {
		case <-m.alive.Done():
		case <-time.After(explainGrace):
		case <-ctx.Done():
		}
	}
	select {
	case <-m.alive.Done():
	default:
		return err
	}
	if m.closed.Load() {
		return errLetGo
	}
	<-m.done // watch closes it right after alive has ended
	return fault.New(fault.Conflict, "the machine has ended: %s: %s", m.exit.Kind, m.exit.Detail)
}

// Done is closed when the process has ended and its exit is classed.
func (m *Machine) Done() <-chan struct{} { return m.done }

// Exit tells how; valid once Done is closed.
func (m *Machine) Exit() vmm.Exit {
	select {
	case <-m.done:
		return m.exit
	default:
		return vmm.Exit{}
	}
}

// PowerButton asks the guest to power off.
func (m *Machine) PowerButton(ctx context.Context) error {
	if m.o.PowerButton == nil {
		return fault.New(fault.Precondition, "this machine has no power button")
	}
	return m.o.PowerButton(ctx)
}

// Stop ends the process. When ctx ends before that, it goes on with SIGKILL at once: what it began
// it finishes.
func (m *Machine) Stop(ctx context.Context) error {
	select {
	case <-m.done:
		return nil
	case <-m.alive.Done():
		m.watcher.Wait()
		if m.ended(context.Background(), 0) {
			return nil
		}
		return errLetGo
	default:
	}
	m.stopping.Store(true)
	if ask := m.o.Ask; ask != nil {
		askCtx, cancel := context.WithTimeout(ctx, ask.Grace)
		err := ask.Do(askCtx)
		cancel()
		if err == nil && m.ended(ctx, ask.Grace) {
			return nil
		}
	}
	if ctx.Err() == nil && m.signal(syscall.SIGTERM) == nil && m.ended(ctx, termGrace) {
		return nil
	}
	err := m.signal(syscall.SIGKILL)
	if m.ended(context.WithoutCancel(ctx), killGrace) {
		return nil
	}
	return fault.Wrap(fault.Timeout, err, "process %d does not end", m.o.Process.PID())
}

func (m *Machine) signal(s syscall.Signal) error {
	err := m.o.Process.Signal(s)
	if errors.Is(err, os.ErrProcessDone) {
		return nil
	}
	return err
}

func (m *Machine) ended(ctx context.Context, grace time.Duration) bool {
	t := time.NewTimer(grace)
	defer t.Stop()
	select {
	case <-m.done:
		return true
	case <-ctx.Done():
	case <-t.C:
	}
	select {
	case <-m.done:
		return true
	default:
		return false
	}
}

// Close lets go of the machine without touching it. Done then stays as it is.
func (m *Machine) Close() error {
	m.closed.Store(true)
	m.letGo()
	m.watcher.Wait()
	return m.o.Process.Close()
}

// RemoveSockets removes what a dead machine left in dir; the caller holds the lock. What cannot be
// removed shows at the next start, which needs the place.
func RemoveSockets(dir string, names []string) {
	for _, name := range names {
		_ = os.Remove(filepath.Join(dir, name))
	}
}
