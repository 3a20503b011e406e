package channel

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"pgregory.net/rapid"

	"banger/internal/hosttest"
)

func TestMain(m *testing.M) { hosttest.Main(m) }

// event is what a decoder found: payload, a reset or garbage.
type event struct {
	kind string
	data string
}

func decode(t interface{ Fatal(...any) }, chunks ...[]byte) []event {
	var got []event
	d := decoder{
		data: func(p []byte) error {
			if len(got) > 0 && got[len(got)-1].kind == "data" {
				got[len(got)-1].data += string(p)
			} else {
				got = append(got, event{"data", string(p)})
			}
			return nil
		},
		reset: func(n nonce) error { got = append(got, event{"reset", string(n[:])}); return nil },
		word: func(w word) error {
			got = append(got, event{"word", fmt.Sprintf("%d %d %s", w.kind, w.tag, w.payload)})
			return nil
		},
		garbled: func() error { got = append(got, event{kind: "garbled"}); return nil },
	}
	for _, c := range chunks {
		if err := d.write(c); err != nil {
			t.Fatal(err)
		}
	}
	return got
}

// payload draws bytes in which those that mean something are frequent.
func payload(t *rapid.T, label string) []byte {
	b := rapid.OneOf(rapid.Byte(), rapid.SampledFrom([]byte{esc, codeESC, codeReset, codeWord}))
	return rapid.SliceOfN(b, 0, 64).Draw(t, label)
}

func chop(t *rapid.T, p []byte) [][]byte {
	var chunks [][]byte
	for len(p) > 0 {
		n := rapid.IntRange(1, len(p)).Draw(t, "chunk")
		chunks, p = append(chunks, p[:n]), p[n:]
	}
	return chunks
}

func TestCodecKeepsPayloadResetsAndWords(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		var wire []byte
		var want []event
		for range rapid.IntRange(0, 6).Draw(t, "parts") {
			switch rapid.IntRange(0, 2).Draw(t, "what") {
			case 0:
				var n nonce
				copy(n[:], payload(t, "nonce"))
				wire = append(wire, reset(n)...)
				want = append(want, event{"reset", string(n[:])})
				continue
			case 1:
				w := word{rapid.Byte().Draw(t, "kind"), rapid.SampledFrom([]byte{0, 1, esc}).Draw(t, "tag"), payload(t, "word")}
				wire = append(wire, w.bytes()...)
				want = append(want, event{"word", fmt.Sprintf("%d %d %s", w.kind, w.tag, w.payload)})
				continue
			}
			p := payload(t, "payload")
			wire = stuff(wire, p)
			if len(p) == 0 {
				continue
			}
			if len(want) > 0 && want[len(want)-1].kind == "data" {
				want[len(want)-1].data += string(p)
			} else {
				want = append(want, event{"data", string(p)})
			}
		}
		got := decode(t, chop(t, wire)...)
		if len(got) != len(want) {
			t.Fatalf("got %q, want %q", got, want)
		}
		for i := range got {
			if got[i] != want[i] {
				t.Fatalf("got %q, want %q", got, want)
			}
		}
	})
}

// Whatever came before, cut anywhere, a reset is found and what follows it is clean.
func TestCodecResyncsAfterAnything(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		n := nonce{esc, codeReset, esc, esc, 0, 1, 2, 3}
		p := payload(t, "after")
		wire := append(payload(t, "garbage"), reset(n)...)
		wire = stuff(wire, p)
		got := decode(t, chop(t, wire)...)
		want := []event{{"reset", string(n[:])}}
		if len(p) > 0 {
			want = append(want, event{"data", string(p)})
		}
		if len(got) < len(want) {
			t.Fatalf("got %q, want it to end in %q", got, want)
		}
		for i, e := range got[len(got)-len(want):] {
			if e != want[i] {
				t.Fatalf("got %q, want it to end in %q", got, want)
			}
		}
	})
}

func FuzzDecoder(f *testing.F) {
	f.Add([]byte{esc, codeReset, esc, 0, esc, esc})
	f.Fuzz(func(t *testing.T, p []byte) {
		whole := decode(t, p)
		var bytewise [][]byte
		for i := range p {
			bytewise = append(bytewise, p[i:i+1])
		}
		cut := decode(t, bytewise...)
		if len(whole) != len(cut) {
			t.Fatalf("whole %q, cut %q", whole, cut)
		}
	})
}

// port plays a virtio-serial port: hosts connect to the socket one after the other, and without one
// the port reads as ended and swallows what is written.
type port struct {
	l    net.Listener
	slow time.Duration // the first write takes this long
	deaf int           // so many connections hear nothing of the guest
	mu   sync.Mutex
	host net.Conn
	stop bool
}

func newPort(t *testing.T) (*port, func(context.Context) (net.Conn, error)) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	p := &port{l: l, deaf: -1}
	return p, func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}
}

func (p *port) connected(accept bool) net.Conn {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.host == nil && accept && !p.stop {
		_ = p.l.(*net.UnixListener).SetDeadline(time.Now().Add(time.Millisecond))
		if p.host, _ = p.l.Accept(); p.host != nil {
			p.deaf--
		}
	}
	return p.host
}

func (p *port) lose(c net.Conn) {
	p.mu.Lock()
	defer p.mu.Unlock()
	c.Close()
	if p.host == c {
		p.host = nil
	}
}

func (p *port) Read(b []byte) (int, error) {
	c := p.connected(true)
	if p.stopped() {
		return 0, net.ErrClosed
	}
	if c == nil {
		return 0, io.EOF
	}
	n, err := c.Read(b)
	if err != nil {
		p.lose(c)
		return n, io.EOF
	}
	return n, nil
}

func (p *port) Write(b []byte) (int, error) {
	time.Sleep(p.slow)
	p.slow = 0
	if p.mute() {
		return len(b), nil
	}
	if c := p.connected(false); c != nil {
		if n, err := c.Write(b); err != nil {
			p.lose(c)
			return max(n, len(b)), nil
		}
	}
	return len(b), nil
}

func (p *port) mute() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.deaf >= 0 }

func (p *port) stopped() bool { p.mu.Lock(); defer p.mu.Unlock(); return p.stop }

func (p *port) Close() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.stop = true
	if p.host != nil {
		p.host.Close()
	}
	return p.l.Close()
}

// echo answers every stream with what it reads, and ends its half after the other side's.
func echo(l net.Listener, wg *sync.WaitGroup) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		wg.Go(func() {
			defer c.Close()
			_, _ = io.Copy(c, c)
			_ = c.(Stream).CloseWrite()
		})
	}
}

func startEcho(t *testing.T, p io.ReadWriteCloser) net.Listener {
	l := Listen(p, nil)
	var wg sync.WaitGroup
	wg.Go(func() { echo(l, &wg) })
	t.Cleanup(func() { l.Close(); wg.Wait() })
	return l
}

func within(t *testing.T, d time.Duration) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), d)
	t.Cleanup(cancel)
	return ctx
}

// roundTrip sends n random bytes, ends its half, and compares what comes back.
func roundTrip(ctx context.Context, h *Host, n int) error {
	c, err := h.Open(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	blob := make([]byte, n)
	r := rand.NewChaCha8([32]byte{byte(n)})
	_, _ = r.Read(blob)
	for i := 0; i < n; i += 97 {
		blob[i] = esc
	}
	sent := make(chan error, 1)
	go func() {
		_, err := c.Write(blob)
		sent <- errors.Join(err, c.(Stream).CloseWrite())
	}()
	h2 := sha256.New()
	_, err = io.Copy(h2, c)
	if err = errors.Join(err, <-sent); err != nil {
		return err
	}
	if want := sha256.Sum256(blob); !bytes.Equal(h2.Sum(nil), want[:]) {
		return errors.New("the bytes came back changed")
	}
	return nil
}

func TestConcurrentStreams(t *testing.T) {
	p, dial := newPort(t)
	startEcho(t, p)
	var dials atomic.Int32
	h := NewHost(func(ctx context.Context) (net.Conn, error) { dials.Add(1); return dial(ctx) })
	defer h.Close()
	ctx := within(t, 20*time.Second)
	var wg sync.WaitGroup
	for i := range 12 {
		wg.Go(func() {
			if err := roundTrip(ctx, h, 1+i*70_001); err != nil {
				t.Errorf("stream %d: %v", i, err)
			}
		})
	}
	wg.Wait()
	if n := dials.Load(); n > 3 { // a guest that is slow to answer is asked again
		t.Errorf("%d dials for one session", n)
	}
}

func TestHostBeforeGuest(t *testing.T) {
	p, dial := newPort(t)
	h := NewHost(dial)
	defer h.Close()
	ctx := within(t, 10*time.Second)
	got := make(chan error, 1)
	go func() { got <- roundTrip(ctx, h, 1000) }()
	time.Sleep(100 * time.Millisecond) // the preamble waits in the socket
	startEcho(t, p)
	if err := <-got; err != nil {
		t.Fatal(err)
	}
}

// TestAnswerLost: the guest wrote to a host that had gone, and QEMU keeps from the next one what it writes.
func TestAnswerLost(t *testing.T) {
	p, dial := newPort(t)
	p.deaf = 2
	startEcho(t, p)
	var dials atomic.Int32
	h := NewHost(func(ctx context.Context) (net.Conn, error) { dials.Add(1); return dial(ctx) })
	defer h.Close()
	if err := roundTrip(within(t, 20*time.Second), h, 100_000); err != nil {
		t.Fatal(err)
	}
	if n := dials.Load(); n < 3 {
		t.Errorf("%d dials", n)
	}
}

// TestAnswerLate: a guest that is slower than the host is patient is heard all the same.
func TestAnswerLate(t *testing.T) {
	p, dial := newPort(t)
	p.slow = answerFirst + answerFirst/2
	startEcho(t, p)
	h := NewHost(dial)
	defer h.Close()
	for range 3 {
		if err := roundTrip(within(t, 20*time.Second), h, 100_000); err != nil {
			t.Fatal(err)
		}
	}
}

// TestNobodyAccepts: a process that stands still takes no more connections than its queue holds.
func TestNobodyAccepts(t *testing.T) {
	p, dial := newPort(t)
	var dials atomic.Int32
	h := NewHost(func(ctx context.Context) (net.Conn, error) {
		if dials.Add(1) < 3 {
			return nil, syscall.EAGAIN
		}
		return dial(ctx)
	})
	defer h.Close()
	startEcho(t, p)
	if err := roundTrip(within(t, 20*time.Second), h, 1000); err != nil {
		t.Fatal(err)
	}
}

func TestReconnectMidFrame(t *testing.T) {
	p, dial := newPort(t)
	startEcho(t, p)
	for i := range 10 {
		var conn net.Conn
		h := NewHost(func(ctx context.Context) (net.Conn, error) {
			c, err := dial(ctx)
			conn = c
			return c, err
		})
		c, err := h.Open(within(t, 10*time.Second))
		if err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
		go func() { _, _ = c.Write(bytes.Repeat([]byte{esc, byte(i)}, 200_000)) }()
		time.Sleep(time.Duration(i) * time.Millisecond)
		if i%2 == 0 {
			_, _ = conn.Write([]byte{esc}) // cut between ESC and its code
		}
		conn.Close() // the host vanishes
		if err := roundTrip(within(t, 10*time.Second), h, 100_000); err != nil {
			t.Fatalf("round %d, after the connection was lost: %v", i, err)
		}
		h.Close()
	}
}

func TestGuestRestarts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	nl, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer nl.Close()
	guest := make(chan net.Conn, 16) // more than there are in the time
	go func() {
		for c, err := nl.Accept(); err == nil; c, err = nl.Accept() { // a guest that is slow to answer is asked again
			guest <- c
		}
	}()
	var d net.Dialer
	h := NewHost(func(ctx context.Context) (net.Conn, error) { return d.DialContext(ctx, "unix", path) })
	defer h.Close()
	open := make(chan error, 1)
	go func() { _, err := h.Open(within(t, 10*time.Second)); open <- err }()
	wire := <-guest
	// The first agent takes the preamble and dies before it answers.
	if _, err := io.ReadFull(wire, make([]byte, 2+nonceSize)); err != nil {
		t.Fatal(err)
	}
	for {
		startEcho(t, wire)
		select {
		case err := <-open:
			if err != nil {
				t.Fatalf("the host did not ask the second agent: %v", err)
			}
			return
		case wire = <-guest:
		}
	}
}

func TestOpenEndsWithContext(t *testing.T) {
	p, dial := newPort(t)
	defer p.Close()
	h := NewHost(dial)
	defer h.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	if _, err := h.Open(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Fatalf("got %v, want the deadline", err)
	}
}

func TestCloseEndsOpen(t *testing.T) {
	p, dial := newPort(t)
	defer p.Close()
	h := NewHost(dial)
	got := make(chan error, 1)
	go func() { _, err := h.Open(t.Context()); got <- err }()
	time.Sleep(50 * time.Millisecond)
	h.Close()
	if err := <-got; err == nil {
		t.Fatal("Open succeeded on a closed channel")
	}
	if _, err := h.Open(t.Context()); err == nil {
		t.Fatal("Open succeeded after Close")
	}
}

// A stream's Close wakes its own reader, as http2 expects of a connection.
func TestCloseWakesReader(t *testing.T) {
	p, dial := newPort(t)
	startEcho(t, p)
	h := NewHost(dial)
	defer h.Close()
	c, err := h.Open(within(t, 10*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan error, 1)
	go func() { _, err := c.Read(make([]byte, 1)); got <- err }()
	time.Sleep(20 * time.Millisecond)
	c.Close()
	select {
	case err := <-got:
		if err == nil {
			t.Fatal("read something from a closed stream")
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the reader sleeps on")
	}
}
