package forward

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/fault"
	"banger/internal/hosttest"
	"banger/internal/vm"
)

func TestMain(m *testing.M) { hosttest.Main(m) }

// guests is a forwarder to VMs whose port 7 sends back what it gets, once the sender has ended.
func guests(t *testing.T) *Forwarder {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer conn.Close()
				text, _ := io.ReadAll(conn)
				_, _ = conn.Write(text)
			}()
		}
	}()
	f := New(func(ctx context.Context, _ vm.ID, port uint16) (Conn, error) {
		if port != 7 {
			return nil, errors.New("nothing listens there")
		}
		conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", l.Addr().String())
		if err != nil {
			return nil, err
		}
		return conn.(*net.TCPConn), nil
	}, slog.New(slog.DiscardHandler))
	t.Cleanup(func() {
		f.Close()
		l.Close()
		<-ended
	})
	return f
}

// free returns a port that nobody has.
func free(t *testing.T, guest uint16) vm.Port {
	t.Helper()
	return vm.Port{Host: netip.AddrPortFrom(netip.MustParseAddr("127.0.0.1"), hosttest.Port(t)), Guest: guest}
}

func dial(t *testing.T, p vm.Port) *net.TCPConn {
	t.Helper()
	conn, err := net.DialTimeout("tcp", p.Host.String(), 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

// isReset wants a connection that ends with a reset: a client is not to take it for an answer.
func isReset(p vm.Port) error {
	conn, err := net.DialTimeout("tcp", p.Host.String(), 10*time.Second)
	if err == nil {
		defer conn.Close()
		conn.SetReadDeadline(time.Now().Add(10 * time.Second))
		_, err = conn.Read(make([]byte, 1))
	}
	if errors.Is(err, syscall.ECONNRESET) {
		return nil
	}
	return fmt.Errorf("want a reset, got %w", err)
}

func echo(t *testing.T, p vm.Port, text string) string {
	t.Helper()
	conn := dial(t, p)
	if _, err := conn.Write([]byte(text)); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	got, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return string(got)
}

func set(t *testing.T, f *Forwarder, id vm.ID, ports ...vm.Port) {
	t.Helper()
	if err := f.Set(id, ports); err != nil {
		t.Fatal(err)
	}
}

func TestBothWaysAndHalfClosed(t *testing.T) {
	f, p := guests(t), free(t, 7)
	set(t, f, "a", p)
	text := strings.Repeat("banger", 100_000)
	if got := echo(t, p, text); got != text {
		t.Errorf("%d bytes came back of %d", len(got), len(text))
	}
	set(t, f, "a", p) // what holds already
	if got := echo(t, p, "again"); got != "again" {
		t.Errorf("got %q", got)
	}
}

func TestClosedPortEndsItsConnections(t *testing.T) {
	f, p, q := guests(t), free(t, 7), free(t, 7)
	set(t, f, "a", p, q)
	conn := dial(t, p)
	for f.Status("a", p).Connections == 0 {
		time.Sleep(time.Millisecond) // until it is accepted
	}
	set(t, f, "a", q)
	conn.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := conn.Read(make([]byte, 1)); err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("read %d, %v", n, err)
	}
	if _, err := net.Dial("tcp", p.Host.String()); err == nil {
		t.Error("a removed port still listens")
	}
	if s := f.Status("a", p); s != (Status{}) {
		t.Errorf("status %+v", s)
	}
	if got := echo(t, q, "x"); got != "x" || !f.Status("a", q).Listening {
		t.Error("the other port is gone")
	}
	set(t, f, "a")
	if len(f.machines) > 0 {
		t.Error("a VM without ports is remembered")
	}
}

func TestTakenPortChangesNothing(t *testing.T) {
	f, p, q := guests(t), free(t, 7), free(t, 7)
	other, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	taken := vm.Port{Host: other.Addr().(*net.TCPAddr).AddrPort(), Guest: 7}
	set(t, f, "a", p)
	if err := f.Check("a", []vm.Port{p, q}); err != nil {
		t.Errorf("its own and a free port: %v", err)
	}
	if err := f.Check("b", []vm.Port{p}); fault.KindOf(err) != fault.Conflict {
		t.Errorf("another VM's port: %v", err)
	}
	moved := vm.Port{Host: p.Host, Guest: 8}
	for _, ports := range [][]vm.Port{{p, q, taken}, {moved, taken}} {
		err = f.Set("a", ports)
		if fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" || !strings.Contains(err.Error(), taken.Host.String()) {
			t.Errorf("a taken port: %v", err)
		}
		if f.Status("a", q).Listening || !f.Status("a", p).Listening {
			t.Error("something has changed")
		}
		if got := echo(t, p, "x"); got != "x" {
			t.Errorf("got %q", got)
		}
	}
	if err := f.Check("a", []vm.Port{{Host: netip.MustParseAddrPort("198.51.100.1:80"), Guest: 1}}); fault.KindOf(err) != fault.Usage {
		t.Errorf("an address of nobody's: %v", err)
	}
}

func TestMovedPortLeadsElsewhere(t *testing.T) {
	f, p := guests(t), free(t, 8)
	set(t, f, "a", p)
	if err := isReset(p); err != nil {
		t.Errorf("a port where nothing listens in the guest: %v", err)
	}
	p.Guest = 7
	set(t, f, "a", p)
	if got := echo(t, p, "x"); got != "x" {
		t.Errorf("got %q", got)
	}
}

func TestTooManyConnections(t *testing.T) {
	f, p := guests(t), free(t, 7)
	set(t, f, "a", p)
	m := f.machines["a"]
	for range cap(m.slots) {
		m.slots <- struct{}{}
	}
	if err := isReset(p); err != nil {
		t.Errorf("one too many: %v", err)
	}
	<-m.slots
	if got := echo(t, p, "x"); got != "x" {
		t.Errorf("got %q", got)
	}
	for range cap(m.slots) - 1 { // those of the test: a connection that is just ending gives its own back
		<-m.slots
	}
}
