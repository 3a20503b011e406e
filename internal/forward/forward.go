// Package forward leads TCP connections to ports of the host into VMs. It holds the listeners; how a VM is reached is
// its caller's.
package forward

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"

	"banger/internal/fault"
	"banger/internal/vm"
)

const (
	maxConnections = 512              // of one VM at once; further ones are closed at once
	dialTimeout    = 15 * time.Second // until the VM's side is there
	acceptPause    = 50 * time.Millisecond
)

// Conn is one side of a forwarded connection.
type Conn interface {
	io.ReadWriteCloser
	CloseWrite() error
}

// Dial connects to a port inside a VM. The connection may end with ctx.
type Dial func(ctx context.Context, id vm.ID, port uint16) (Conn, error)

// Forwarder holds the listeners of all VMs. It is safe for concurrent use.
type Forwarder struct {
	dial Dial
	log  *slog.Logger

	mu       sync.Mutex
	machines map[vm.ID]*machine
	all      sync.WaitGroup
}

// machine is what belongs to one VM.
type machine struct {
	listeners map[vm.Port]*listener
	slots     chan struct{}
}

// listener is one open port of the host.
type listener struct {
	port vm.Port
	net.Listener
	life context.Context
	end  context.CancelFunc

	mu    sync.Mutex
	conns int
}

// New returns a forwarder without listeners.
func New(dial Dial, logger *slog.Logger) *Forwarder {
	return &Forwarder{dial: dial, log: logger, machines: map[vm.ID]*machine{}}
}

// Check finds ports that cannot be listened on, those that the VM itself has open apart, and opens none.
func (f *Forwarder) Check(id vm.ID, ports []vm.Port) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, p := range ports {
		if f.has(id, p) {
			continue
		}
		l, err := net.Listen("tcp", p.Host.String())
		if err != nil {
			return f.listenFault(p, err)
		}
		_ = l.Close() // nobody used it
	}
	return nil
}

// has tells whether the VM listens on the host side of p; mu is held.
func (f *Forwarder) has(id vm.ID, p vm.Port) bool {
	m := f.machines[id]
	if m == nil {
		return false
	}
	for held := range m.listeners {
		if held.Host == p.Host {
			return true
		}
	}
	return false
}

// Set makes these the open ports of a VM: new ones are opened, all or none, then others are closed with their
// connections. No ports close all.
func (f *Forwarder) Set(id vm.ID, ports []vm.Port) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[id]
	if m == nil {
		if len(ports) == 0 {
			return nil
		}
		m = &machine{listeners: map[vm.Port]*listener{}, slots: make(chan struct{}, maxConnections)}
	}
	// A host port that now leads elsewhere is closed first; it is opened again when the rest fails.
	var closed []vm.Port
	for held, l := range m.listeners {
		if moved := func(p vm.Port) bool { return p.Host == held.Host && p != held }; slices.ContainsFunc(ports, moved) {
			l.stop()
			delete(m.listeners, held)
			closed = append(closed, held)
		}
	}
	opened, err := f.open(m, ports)
	if err != nil {
		restored, errAgain := f.open(m, closed)
		f.start(id, m, restored)
		return errors.Join(err, errAgain)
	}
	for held, l := range m.listeners {
		if !slices.Contains(ports, held) {
			l.stop()
			delete(m.listeners, held)
		}
	}
	f.start(id, m, opened)
	f.machines[id] = m
	if len(m.listeners) == 0 {
		delete(f.machines, id)
	}
	return nil
}

// open listens on those of the ports that are not open, all or none; mu is held.
func (f *Forwarder) open(m *machine, ports []vm.Port) ([]*listener, error) {
	var opened []*listener
	for _, p := range ports {
		if _, ok := m.listeners[p]; ok {
			continue
		}
		l, err := net.Listen("tcp", p.Host.String())
		if err != nil {
			for _, l := range opened {
				l.stop()
			}
			return nil, f.listenFault(p, err)
		}
		life, end := context.WithCancel(context.Background())
		opened = append(opened, &listener{port: p, Listener: l, life: life, end: end})
	}
	return opened, nil
}

// start takes connections; mu is held.
func (f *Forwarder) start(id vm.ID, m *machine, opened []*listener) {
	for _, l := range opened {
		m.listeners[l.port] = l
		f.all.Go(func() { f.accept(id, m, l) })
	}
}

func (f *Forwarder) listenFault(p vm.Port, err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fault.Wrap(fault.Conflict, err, "port %s of the host is taken", p.Host).
			WithHint("choose another port, or see who has it: ss -ltnp 'sport = :%d'", p.Host.Port())
	case errors.Is(err, syscall.EACCES):
		return fault.Wrap(fault.Precondition, err, "you may not listen on port %s of the host", p.Host).
			WithHint("choose a port from 1024 up, for example %d:%d", 8000+int(p.Host.Port())%1000, p.Guest)
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return fault.Wrap(fault.Usage, err, "%s is no address of this host", p.Host.Addr()).WithHint("leave the address out: 127.0.0.1 is meant then")
	}
	return fault.Wrap(fault.Precondition, err, "cannot listen on port %s of the host", p.Host)
}

// Status is what becomes of a VM's port now.
type Status struct {
	Listening   bool
	Connections int
}

// Status tells about one port of a VM.
func (f *Forwarder) Status(id vm.ID, p vm.Port) Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	m := f.machines[id]
	if m == nil || m.listeners[p] == nil {
		return Status{}
	}
	l := m.listeners[p]
	l.mu.Lock()
	defer l.mu.Unlock()
	return Status{Listening: true, Connections: l.conns}
}

// Close closes all ports and connections, and returns when their goroutines have ended.
func (f *Forwarder) Close() {
	f.mu.Lock()
	for id, m := range f.machines {
		for _, l := range m.listeners {
			l.stop()
		}
		delete(f.machines, id)
	}
	f.mu.Unlock()
	f.all.Wait()
}

func (l *listener) stop() {
	l.end()
	_ = l.Listener.Close() // a listener has nothing that could be lost
}

// accept takes connections until the listener is stopped.
func (f *Forwarder) accept(id vm.ID, m *machine, l *listener) {
	for {
		conn, err := l.Accept()
		if l.life.Err() != nil {
			if err == nil {
				_ = conn.Close()
			}
			return
		}
		if err != nil { // no file descriptors are left, or the client was gone again: the next one may come
			f.log.Warn("a forwarded port takes no connection", "port", l.port.String(), "error", err)
			select {
			case <-l.life.Done():
				return
			case <-time.After(acceptPause):
			}
			continue
		}
		select {
		case m.slots <- struct{}{}:
		default:
			f.log.Warn("a forwarded port has too many connections", "port", l.port.String(), "connections", maxConnections)
			reset(conn)
			continue
		}
		f.all.Go(func() {
			defer func() { <-m.slots }()
			l.count(1)
			defer l.count(-1)
			f.carry(id, l, conn.(*net.TCPConn))
		})
	}
}

func (l *listener) count(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.conns += n
}

// reset ends a connection so that the client sees a failure, not an orderly end.
func reset(conn net.Conn) {
	if tcp, ok := conn.(*net.TCPConn); ok {
		_ = tcp.SetLinger(0)
	}
	_ = conn.Close()
}

// carry connects a client with the VM.
func (f *Forwarder) carry(id vm.ID, l *listener, client *net.TCPConn) {
	ctx, cancel := context.WithCancel(l.life)
	defer cancel()
	patience := time.AfterFunc(dialTimeout, cancel)
	guest, err := f.dial(ctx, id, l.port.Guest)
	patience.Stop()
	if err != nil {
		f.log.Info("a forwarded connection did not come about", "id", id, "port", l.port.String(), "error", err)
		reset(client)
		return
	}
	defer guest.Close()
	defer client.Close()
	end := context.AfterFunc(l.life, func() {
		reset(client)
		_ = guest.Close()
	})
	defer end()
	Splice(client, guest)
}

// Splice copies between two connections, both ways, until both have ended: the end of one side's writing is passed on, so
// that the other may still answer. When one breaks, both are closed.
func Splice(a, b Conn) {
	var both sync.WaitGroup
	one := func(to, from Conn) {
		_, err := io.Copy(to, from)
		if err == nil {
			err = to.CloseWrite()
		}
		if err != nil {
			_ = a.Close()
			_ = b.Close()
		}
	}
	both.Go(func() { one(a, b) })
	both.Go(func() { one(b, a) })
	both.Wait()
}
