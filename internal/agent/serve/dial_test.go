package serve_test

import (
	"context"
	"io"
	"net"
	"strings"
	"testing"

	"banger/internal/agent/serve"
	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/hosttest/need"
)

// echoer listens on an address of this machine and sends back what it got when its client has ended.
func echoer(t *testing.T, address string) uint16 {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
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
	t.Cleanup(func() { l.Close(); <-done })
	return uint16(l.Addr().(*net.TCPAddr).Port)
}

// Bytes go both ways over the guest channel, and the end of one side leaves the other open.
func TestDial(t *testing.T) {
	need.IPv6(t)
	client, _ := start(t, serve.Options{Dial: serve.DialLoopback})
	for _, address := range []string{"127.0.0.1:0", "[::1]:0"} { // both are "localhost" to programs
		conn, err := guest.Dial(within(t), client, echoer(t, address))
		if err != nil {
			t.Fatal(err)
		}
		text := strings.Repeat("0123456789", 50_000)
		sent := make(chan error, 1)
		go func() {
			_, err := io.Copy(conn, strings.NewReader(text))
			if err == nil {
				err = conn.CloseWrite()
			}
			sent <- err
		}()
		got, err := io.ReadAll(conn)
		if err != nil || string(got) != text {
			t.Errorf("%s: %d bytes came back, %v", address, len(got), err)
		}
		if err := <-sent; err != nil {
			t.Errorf("%s: sending: %v", address, err)
		}
		if err := conn.Close(); err != nil {
			t.Errorf("close: %v", err)
		}
		if err := conn.Close(); err != nil {
			t.Errorf("close again: %v", err)
		}
	}
}

func TestDialNobody(t *testing.T) {
	client, _ := start(t, serve.Options{Dial: serve.DialLoopback})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := uint16(l.Addr().(*net.TCPAddr).Port)
	l.Close()
	if _, err := guest.Dial(within(t), client, port); fault.KindOf(err) != fault.Conflict || fault.HintOf(err) == "" {
		t.Errorf("nobody listens: %v", err)
	}
	old, _ := start(t, serve.Options{})
	if _, err := guest.Dial(within(t), old, 22); fault.KindOf(err) != fault.Precondition {
		t.Errorf("an agent that cannot: %v", err)
	}
	if _, err := guest.Dial(within(t), client, 0); fault.KindOf(err) == fault.Conflict || err == nil {
		t.Errorf("no port: %v", err)
	}
}

// When the host goes away, the guest's program sees the end of its connection.
func TestDialerVanishes(t *testing.T) {
	for name, vanish := range map[string]func(cancel, cut func()){
		"cancelled":    func(cancel, _ func()) { cancel() },
		"channel lost": func(_, cut func()) { cut() },
	} {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			client, cut := start(t, serve.Options{Dial: serve.DialLoopback})
			ctx, cancel := context.WithCancel(within(t))
			defer cancel()
			conn, err := guest.Dial(ctx, client, uint16(l.Addr().(*net.TCPAddr).Port))
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			inside, err := l.Accept()
			if err != nil {
				t.Fatal(err)
			}
			defer inside.Close()
			vanish(cancel, cut)
			deadline, _ := within(t).Deadline()
			inside.SetReadDeadline(deadline)
			if _, err := inside.Read(make([]byte, 1)); err == nil || strings.Contains(err.Error(), "timeout") {
				t.Errorf("read: %v", err)
			}
		})
	}
}
