package builder

import (
	"context"
	"io"
	"net"
	"testing"
	"time"

	"banger/internal/fault"
)

const wayLimit = 20 * time.Second

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l
}

func dial(t *testing.T, l net.Listener) net.Conn {
	t.Helper()
	c, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(wayLimit)); err != nil {
		t.Fatal(err)
	}
	return c
}

// TestForward: what a guest sends reaches the proxy and its answer the guest, more connections than there are places
// wait, and the end of the SSH connection ends those that the proxy would keep for ever.
func TestForward(t *testing.T) {
	inside, proxy := listen(t), listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		forward(ctx, inside, proxy.Addr().String())
	}()

	guest := dial(t, inside)
	if _, err := io.WriteString(guest, "ask"); err != nil {
		t.Fatal(err)
	}
	at, err := proxy.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = at.Close() }()
	asked := make([]byte, 3)
	if _, err := io.ReadFull(at, asked); err != nil || string(asked) != "ask" {
		t.Fatalf("%q, %v", asked, err)
	}
	if _, err := io.WriteString(at, "answer"); err != nil {
		t.Fatal(err)
	}
	answer := make([]byte, 6)
	if _, err := io.ReadFull(guest, answer); err != nil || string(answer) != "answer" {
		t.Fatalf("%q, %v", answer, err)
	}

	for range maxForwarded + 1 { // the last two find no place
		dial(t, inside)
	}
	cancel()
	select {
	case <-ended:
	case <-time.After(wayLimit):
		t.Fatal("it does not end")
	}
	if err := at.SetDeadline(time.Now().Add(wayLimit)); err != nil {
		t.Fatal(err)
	}
	if _, err := at.Read(asked); err == nil {
		t.Error("the connection to the proxy lives on")
	} else if timeout, ok := err.(net.Error); ok && timeout.Timeout() {
		t.Error("the connection to the proxy lives on")
	}
}

// TestProxyOfItsOwnName: a proxy that is spoken to by TLS is reached by the name that its certificate has.
func TestProxyOfItsOwnName(t *testing.T) {
	g := &guest{}
	if got, err := g.bringProxy("https://proxy.example:3129"); err != nil || got != "https://proxy.example:3129" {
		t.Errorf("%q, %v", got, err)
	}
	for _, bad := range []string{"http://", "http://[::1", "://"} {
		if _, err := g.bringProxy(bad); fault.KindOf(err) != fault.Precondition {
			t.Errorf("%q: %v", bad, err)
		}
	}
}
