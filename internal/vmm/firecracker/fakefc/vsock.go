package fakefc

import (
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"
)

// Of the vsock device.
const (
	maxStreams    = 1023
	firstHostPort = 1 << 30
	minConnect    = 10 // bytes of the CONNECT line, with its newline
	maxConnect    = 32
)

// vsock is the device's end on the host: a Unix socket whose clients name the port they want.
type vsock struct {
	m    *machine
	l    *net.UnixListener
	mu   sync.Mutex
	open map[*stream]bool
	next uint32
}

// listenVsock binds the socket. It is never removed when the process ends.
func listenVsock(m *machine, path string) (*vsock, error) {
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fail("Cannot create backend for vsock device: Error binding to the host-side Unix socket: %s", osError(err))
	}
	l.SetUnlinkOnClose(false)
	return &vsock{m: m, l: l, open: map[*stream]bool{}, next: firstHostPort}, nil
}

func (v *vsock) close() { _ = v.l.Close() }

// activate begins to answer: before the guest's driver is there, clients connect and hear nothing.
func (v *vsock) activate(g *guest) {
	if v == nil {
		return
	}
	go func() {
		for {
			c, err := v.l.AcceptUnix()
			if err != nil {
				return
			}
			go v.serve(g, c)
		}
	}()
}

func (v *vsock) serve(g *guest, c *net.UnixConn) {
	g.clock.Wait() // a paused machine accepts nobody
	port, ok := readConnect(c)
	if !ok || v.m.faults.Vsock == "close" {
		_ = c.Close()
		return
	}
	if v.spoil(c) {
		return
	}
	v.mu.Lock()
	listens := port == AgentPort && g.up() && len(v.open) < maxStreams
	host := v.next
	if v.next++; v.next < firstHostPort {
		v.next = firstHostPort
	}
	s := &stream{UnixConn: c, v: v, g: g}
	if listens {
		v.open[s] = true
	}
	v.mu.Unlock()
	if !listens {
		_ = c.Close() // the guest refuses, and no word of it gets here
		return
	}
	if _, err := fmt.Fprintf(c, "OK %d\n", host); err != nil {
		_ = s.Close()
		return
	}
	if !g.agent.offer(s) {
		_ = s.Close()
	}
}

// readConnect reads "CONNECT <port>\n", which must be there as a whole: what comes in pieces is given up.
func readConnect(c *net.UnixConn) (port uint32, ok bool) {
	first := make([]byte, minConnect)
	if n, err := c.Read(first); err != nil || n < minConnect {
		return 0, false
	}
	raw, err := c.SyscallConn()
	if err != nil {
		return 0, false
	}
	line := first
	for line[len(line)-1] != '\n' {
		if len(line) == maxConnect {
			return 0, false
		}
		b := make([]byte, 1)
		n := 0
		err = raw.Read(func(fd uintptr) bool {
			n, err = unix.Read(int(fd), b)
			return true
		})
		if err != nil || n != 1 {
			return 0, false
		}
		line = append(line, b[0])
	}
	word, number, _ := strings.Cut(strings.TrimSuffix(string(line), "\n"), " ")
	n, err := strconv.ParseUint(strings.TrimSpace(number), 10, 32)
	return uint32(n), err == nil && strings.EqualFold(word, "connect")
}

// reset ends all streams, as a restore does.
func (v *vsock) reset() {
	if v == nil {
		return
	}
	v.mu.Lock()
	streams := make([]*stream, 0, len(v.open))
	for s := range v.open {
		streams = append(streams, s)
	}
	v.mu.Unlock()
	for _, s := range streams {
		_ = s.Close()
	}
}

// stream is one between the host and a program in the guest. Nothing moves while the guest is paused.
type stream struct {
	*net.UnixConn
	v *vsock
	g *guest
}

func (s *stream) Read(b []byte) (int, error) {
	n, err := s.UnixConn.Read(b)
	s.g.clock.Wait()
	return n, err
}

func (s *stream) Write(b []byte) (int, error) {
	s.g.clock.Wait()
	return s.UnixConn.Write(b)
}

func (s *stream) Close() error {
	s.v.mu.Lock()
	delete(s.v.open, s)
	s.v.mu.Unlock()
	return s.UnixConn.Close()
}

// port is what the agent listens on in the guest.
type port struct {
	streams chan net.Conn
	done    chan struct{}
	once    sync.Once
}

func newPort() *port { return &port{streams: make(chan net.Conn), done: make(chan struct{})} }

// offer gives the agent a stream; false: nobody takes it.
func (p *port) offer(c net.Conn) bool {
	select {
	case p.streams <- c:
		return true
	case <-p.done:
		return false
	}
}

func (p *port) Accept() (net.Conn, error) {
	select {
	case c := <-p.streams:
		return c, nil
	case <-p.done:
		return nil, net.ErrClosed
	}
}

func (p *port) Close() error {
	p.once.Do(func() { close(p.done) })
	return nil
}

func (p *port) Addr() net.Addr { return &net.UnixAddr{Net: "vsock", Name: "agent"} }
