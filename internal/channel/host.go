package channel

import (
	"context"
	"crypto/rand"
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/hashicorp/yamux"

	"banger/internal/fault"
)

// Host is the host's end of a guest channel. It connects when a stream is asked for, and again when
// the connection or the guest's end has failed. It may be used from several goroutines.
type Host struct {
	dial func(context.Context) (net.Conn, error)

	mu      sync.Mutex
	closed  bool
	session *session
	attempt *attempt
}

// session is a connection on which the guest has answered.
type session struct {
	*yamux.Session
	conn *hostConn
}

// attempt is a connection in the making, shared by all who wait for it.
type attempt struct {
	waiters int
	cancel  context.CancelFunc
	done    chan struct{}
	session *session
	err     error
}

// NewHost makes the host's end. dial connects to the pipe and is called at most once at a time.
func NewHost(dial func(context.Context) (net.Conn, error)) *Host {
	return &Host{dial: dial}
}

var errClosed = fault.New(fault.Conflict, "the guest channel is closed")

// Open opens a stream. It waits, until ctx ends, for a guest that has not started yet; an error of dial
// and the end of the connection end the wait too.
func (h *Host) Open(ctx context.Context) (net.Conn, error) {
	// A session that died unnoticed shows when the stream is opened: the second try has a new one.
	for try := 0; ; try++ {
		s, err := h.connect(ctx)
		if err != nil {
			return nil, err
		}
		stream, err := s.OpenStream()
		if err == nil {
			return Stream{stream}, nil
		}
		h.forget(s)
		if try == 1 {
			return nil, fault.Wrap(fault.Unexpected, err, "cannot open a stream on the guest channel")
		}
	}
}

// ErrMute is the error of a word that got no answer: the guest knows none, or the connection broke.
var ErrMute = errors.New("the guest did not answer on its channel")

// Say says a word and returns the answer to it, with its code. It waits for the guest as Open does. One word is said
// at a time.
func (h *Host) Say(ctx context.Context, kind byte, question []byte) (code byte, answer []byte, err error) {
	s, err := h.connect(ctx)
	if err != nil {
		return 0, nil, err
	}
	select {
	case s.conn.turn <- struct{}{}:
		defer func() { <-s.conn.turn }()
	case <-ctx.Done():
		return 0, nil, ctx.Err()
	}
	tag, err := s.conn.say(kind, question)
	if err != nil {
		h.forget(s)
		return 0, nil, errors.Join(ErrMute, err)
	}
	for {
		select {
		case w := <-s.conn.answers:
			if w.tag == tag { // else it is to one that nobody waits for any more
				return w.kind, w.payload, nil
			}
		case <-s.CloseChan():
			h.forget(s)
			return 0, nil, ErrMute
		case <-ctx.Done():
			return 0, nil, ctx.Err()
		}
	}
}

// Close ends the session and all its streams, and every wait in Open.
func (h *Host) Close() error {
	h.mu.Lock()
	h.closed = true
	s, a := h.session, h.attempt
	h.session = nil
	h.mu.Unlock()
	if a != nil {
		a.cancel()
		<-a.done
	}
	if s != nil {
		return s.Close()
	}
	return nil
}

func (h *Host) forget(s *session) {
	h.mu.Lock()
	if h.session == s {
		h.session = nil
	}
	h.mu.Unlock()
	_ = s.Close() // its error is the one that brought us here
}

// connect returns the session, made now when there is none.
func (h *Host) connect(ctx context.Context) (*session, error) {
	h.mu.Lock()
	if h.closed {
		h.mu.Unlock()
		return nil, errClosed
	}
	if s := h.session; s != nil && !s.IsClosed() {
		h.mu.Unlock()
		return s, nil
	}
	a := h.join()
	h.mu.Unlock()

	select {
	case <-a.done:
		return a.session, a.err
	case <-ctx.Done():
		h.leave(a)
		return nil, fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err(), "the guest does not answer on its channel")
	}
}

// join returns the attempt under way, or begins one. The caller holds the lock.
func (h *Host) join() *attempt {
	if h.attempt != nil {
		h.attempt.waiters++
		return h.attempt
	}
	// Not the caller's context: others may join and outlive it.
	ctx, cancel := context.WithCancel(context.Background())
	a := &attempt{waiters: 1, cancel: cancel, done: make(chan struct{})}
	h.attempt = a
	old := h.session
	h.session = nil
	go func() {
		if old != nil {
			_ = old.Close() // dead already
		}
		s, err := establish(ctx, h.dial)
		h.finish(a, s, err)
	}()
	return a
}

// leave ends the attempt when nobody waits for it any more.
func (h *Host) leave(a *attempt) {
	h.mu.Lock()
	defer h.mu.Unlock()
	a.waiters--
	if a.waiters > 0 {
		return
	}
	a.cancel()
	if h.attempt == a {
		h.attempt = nil
	}
}

func (h *Host) finish(a *attempt, s *session, err error) {
	h.mu.Lock()
	abandoned := h.closed || h.attempt != a
	if h.attempt == a {
		h.attempt = nil
	}
	if err == nil && abandoned {
		err = errClosed
	}
	if err == nil {
		h.session, a.session = s, s
	}
	h.mu.Unlock()
	if err != nil && s != nil {
		_ = s.Close() // nobody has used it
	}
	a.err = err
	a.cancel()
	close(a.done)
}

// How long the host waits for the guest's answer before it connects and asks again. QEMU loses the guest's output
// when it wrote to a host that had just gone, and keeps the rest of it from the next one.
const (
	answerFirst = 500 * time.Millisecond
	answerMost  = 8 * time.Second
)

// establish connects, shakes hands with the guest, and starts a session.
func establish(ctx context.Context, dial func(context.Context) (net.Conn, error)) (*session, error) {
	// One for all connections: the answer to an earlier one's reset will do.
	var n nonce
	if _, err := rand.Read(n[:]); err != nil {
		return nil, err
	}
	for wait := answerFirst; ; wait = min(2*wait, answerMost) {
		s, err := attach(ctx, dial, n, wait)
		switch {
		case err == nil || ctx.Err() != nil:
			return s, err
		case errors.Is(err, os.ErrDeadlineExceeded):
		case errors.Is(err, syscall.EAGAIN): // connections we gave up have not been accepted yet
			select {
			case <-time.After(wait):
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		default:
			return nil, err
		}
	}
}

// attach makes one connection and waits as long for the guest.
func attach(ctx context.Context, dial func(context.Context) (net.Conn, error), n nonce, wait time.Duration) (*session, error) {
	conn, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	hc := &hostConn{Conn: conn, nonce: n, turn: make(chan struct{}, 1), answers: make(chan word, 1)}
	hc.decoder = decoder{data: hc.onData, reset: hc.onReset, word: hc.onWord, garbled: hc.onGarbled}
	if err := hc.handshake(wait); err != nil {
		stop()
		conn.Close()
		if ctx.Err() != nil {
			err = ctx.Err()
		}
		return nil, fault.Wrap(fault.Unexpected, err, "the guest channel broke before the guest answered")
	}
	if !stop() {
		conn.Close()
		return nil, ctx.Err()
	}
	c := yamuxConfig()
	c.EnableKeepAlive = true
	s, err := yamux.Client(guarded{hc, &guard{r: hc}}, c)
	if err != nil {
		conn.Close()
		return nil, fault.Wrap(fault.Unexpected, err, "cannot start a session on the guest channel")
	}
	return &session{s, hc}, nil
}

// guarded is a hostConn that is read through a guard.
type guarded struct {
	*hostConn
	guard *guard
}

func (g guarded) Read(p []byte) (int, error) { return g.guard.Read(p) }

// hostConn is the pipe as the session sees it.
type hostConn struct {
	net.Conn
	decoder decoder
	in      [32 << 10]byte
	nonce   nonce
	synced  bool
	heard   bool   // the guest sent something in this session
	ready   []byte // decoded, not yet read
	pending []byte // memory of ready
	err     error

	wmu sync.Mutex
	out []byte

	turn    chan struct{} // of whoever says a word
	tag     atomic.Uint32 // of the last one, modulo 256
	answers chan word     // what the guest said to it
	asked   atomic.Int32  // words without an answer; those that nobody waits for any more, too
}

// handshake asks for a new session until the guest has answered, or has not within wait.
func (c *hostConn) handshake(wait time.Duration) error {
	if err := c.SetReadDeadline(time.Now().Add(wait)); err != nil {
		return err
	}
	if err := c.ask(); err != nil {
		return err
	}
	for !c.synced {
		if err := c.fill(); err != nil {
			return err
		}
	}
	return c.SetReadDeadline(time.Time{})
}

func (c *hostConn) ask() error { return c.send(reset(c.nonce)) }

func (c *hostConn) send(p []byte) error {
	if err := c.SetWriteDeadline(time.Now().Add(writeTimeout)); err != nil {
		return err
	}
	if err := writeFull(c.Conn, p); err != nil {
		return err
	}
	return c.SetWriteDeadline(time.Time{})
}

func (c *hostConn) onData(p []byte) error {
	if c.synced {
		c.heard = true
		c.pending = append(c.pending, p...)
	}
	return nil
}

func (c *hostConn) onWord(w word) error {
	if !c.synced {
		return nil
	}
	c.heard = true
	if c.asked.Add(-1) < 0 {
		return errUnasked
	}
	if w.tag != byte(c.tag.Load()) { // nobody waits for it any more
		return nil
	}
	select {
	case <-c.answers: // one that was given up when it came
	default:
	}
	c.answers <- w // there is room: nobody else sends
	return nil
}

// say writes a word, and returns its tag.
func (c *hostConn) say(kind byte, question []byte) (tag byte, err error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	tag = byte(c.tag.Add(1))
	c.asked.Add(1)
	return tag, c.send(word{kind, tag, question}.bytes())
}

func (c *hostConn) onReset(n nonce) error {
	switch {
	case c.synced && n == c.nonce && !c.heard:
		// We asked more than once, and nothing of ours came before the last time.
	case c.synced:
		return errors.New("the guest began a new session")
	case n == c.nonce:
		c.synced = true
	case n == noSession:
		// The guest's agent has just started and may not have seen what we wrote.
		return c.ask()
	}
	return nil
}

func (c *hostConn) onGarbled() error {
	if c.synced {
		return errGarbled
	}
	return nil
}

// fill reads once from the pipe and decodes.
func (c *hostConn) fill() error {
	n, err := c.Conn.Read(c.in[:])
	if n > 0 {
		c.pending = c.pending[:0]
		derr := c.decoder.write(c.in[:n])
		c.ready = c.pending
		if derr != nil {
			return derr
		}
	}
	if err == nil && n == 0 {
		err = io.ErrNoProgress
	}
	return err
}

// Read returns what the guest sent in this session.
func (c *hostConn) Read(p []byte) (int, error) {
	for len(c.ready) == 0 {
		if c.err != nil {
			return 0, c.err
		}
		c.err = c.fill()
	}
	n := copy(p, c.ready)
	c.ready = c.ready[n:]
	return n, nil
}

// Write sends p. The header of a frame goes together with its body.
func (c *hostConn) Write(p []byte) (int, error) {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	c.out = stuff(c.out, p)
	if bodyFollows(p) {
		return len(p), nil
	}
	err := writeFull(c.Conn, c.out)
	c.out = c.out[:0]
	if err != nil {
		return 0, err
	}
	return len(p), nil
}
