package agent

import (
	"errors"
	"net"
	"testing"

	"github.com/mdlayher/vsock"
)

// from is a connection that says where it comes from.
type from struct {
	net.Conn
	addr   net.Addr
	closed bool
}

func (c *from) RemoteAddr() net.Addr { return c.addr }
func (c *from) Close() error         { c.closed = true; return nil }

type queue struct {
	net.Listener
	waiting []net.Conn
}

var errEmpty = errors.New("nobody waits")

func (q *queue) Accept() (net.Conn, error) {
	if len(q.waiting) == 0 {
		return nil, errEmpty
	}
	c := q.waiting[0]
	q.waiting = q.waiting[1:]
	return c, nil
}

func TestOnlyTheHostIsServed(t *testing.T) {
	local := &from{addr: &vsock.Addr{ContextID: vsock.Local, Port: 9}}
	itself := &from{addr: &vsock.Addr{ContextID: 3, Port: 9}}
	other := &from{addr: &net.TCPAddr{}}
	host := &from{addr: &vsock.Addr{ContextID: vsock.Host, Port: 9}}
	l := hostOnly{&queue{waiting: []net.Conn{local, itself, other, host}}}
	got, err := l.Accept()
	if err != nil || got != net.Conn(host) {
		t.Fatalf("accepted %v, %v", got, err)
	}
	if !local.closed || !itself.closed || !other.closed || host.closed {
		t.Error("a stranger is still connected, or the host is not")
	}
	if _, err := l.Accept(); !errors.Is(err, errEmpty) {
		t.Errorf("the listener's end: %v", err)
	}
}

func TestListenerNames(t *testing.T) {
	for _, name := range []string{"vsock:", "vsock:x", "vsock:-1", "vsock:99999999999"} {
		if _, err := listener(t.Context(), name, nil); err == nil {
			t.Errorf("%q is a channel", name)
		}
	}
	if _, err := listener(t.Context(), "vsock:1024", nil); err != nil {
		t.Error(err)
	}
}
