package channel

import (
	"errors"
	"io"
	"net"
	"sync"
	"time"

	"github.com/hashicorp/yamux"
)

// How often the guest looks for a host when none is connected: a port without a host reads as ended.
const (
	pollFirst = 50 * time.Millisecond
	pollMost  = 200 * time.Millisecond
)

// Listen starts the guest's end on port and returns the streams that the connected host opens. The listener
// survives hosts that go and come: an io.EOF from the port means that no host is connected now, and is
// polled with a bounded pause. When port is itself a net.Conn its end is final, and Accept returns io.EOF.
// Closing the listener closes the port. Words are answered by answer; nil: they are not understood.
func Listen(port io.ReadWriteCloser, answer Answer) net.Listener {
	g := &guestEnd{port: port, out: newOutbox(port), answer: answer, streams: make(chan net.Conn), done: make(chan struct{})}
	_, g.final = port.(net.Conn)
	g.decoder = decoder{data: g.onData, reset: g.onReset, garbled: g.drop}
	if answer != nil {
		g.decoder.word = g.onWord
	}
	g.wg.Go(g.pump)
	g.wg.Go(func() { g.out.run(g.done) })
	return g
}

// Answer answers a word: with 0, or the code of a failure, and what is to be said. after, which may be nil, is done when
// that has been said.
type Answer func(kind byte, question []byte) (code byte, answer []byte, after func())

// guestEnd is the guest's end: one goroutine reads the port, and a session lives from reset to reset.
type guestEnd struct {
	port    io.ReadWriteCloser
	out     *outbox
	final   bool
	answer  Answer
	decoder decoder
	streams chan net.Conn
	done    chan struct{}
	once    sync.Once
	wg      sync.WaitGroup
	err     error // why done was closed

	current *guestSession // guarded by the outbox's mutex: what is put there is of this session
}

// guestSession is the pipe as one session sees it: dead as soon as another one began. Its streams begin with its first
// payload: a host that only says words, as to a guest that was just restored, need not wait until they are set up, and
// those of an idle session before are taken down.
type guestSession struct {
	end    *guestEnd
	before *guestSession // whose streams were not taken down yet

	in    *io.PipeReader
	feed  *io.PipeWriter
	mux   *yamux.Session
	ended chan struct{}
}

// Accept returns the next stream.
func (g *guestEnd) Accept() (net.Conn, error) {
	select {
	case s := <-g.streams:
		return s, nil
	case <-g.done:
		return nil, g.err
	}
}

// Addr is the name of the channel.
func (g *guestEnd) Addr() net.Addr { return addr{} }

type addr struct{}

func (addr) Network() string { return "guest-channel" }
func (addr) String() string  { return "guest-channel" }

// Close ends all streams, closes the port, and waits for the goroutines.
func (g *guestEnd) Close() error {
	g.stop(net.ErrClosed)
	err := g.port.Close()
	g.wg.Wait()
	return err
}

func (g *guestEnd) stop(err error) {
	g.once.Do(func() {
		g.err = err
		close(g.done)
	})
}

// pump reads the port until it fails or the listener is closed.
func (g *guestEnd) pump() {
	defer g.replace(nil, nil)
	_ = g.announce() // the port says it again on reading
	buf := make([]byte, 32<<10)
	pause := pollFirst
	for {
		n, err := g.port.Read(buf)
		if n > 0 {
			pause = pollFirst
			if err := g.decoder.write(buf[:n]); err != nil {
				g.stop(err)
				return
			}
		}
		switch {
		case err != nil && (g.final || !errors.Is(err, io.EOF)):
			g.stop(err)
			return
		case n == 0:
			if !g.sleep(pause) {
				return
			}
			pause = min(2*pause, pollMost)
		}
	}
}

func (g *guestEnd) sleep(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-g.done:
		return false
	}
}

// announce tells a host that there is no session.
func (g *guestEnd) announce() error {
	g.out.mu.Lock()
	g.out.buf = append(g.out.buf, reset(noSession)...)
	g.out.mu.Unlock()
	return g.out.flush()
}

func (g *guestEnd) session() *guestSession {
	g.out.mu.Lock()
	defer g.out.mu.Unlock()
	return g.current
}

func (g *guestEnd) drop() error { return g.replace(nil, &noSession) }

func (g *guestEnd) onData(p []byte) error {
	s := g.session()
	if s == nil {
		return nil
	}
	if s.mux == nil {
		if err := s.begin(); err != nil {
			return err
		}
	}
	// The session reads promptly or is closed; what a closed one does not take belongs to nobody.
	_, _ = s.feed.Write(p)
	return nil
}

func (g *guestEnd) onReset(n nonce) error {
	if n == noSession {
		return nil // a guest's word; a host never says it
	}
	return g.replace(&guestSession{end: g}, &n)
}

// onWord answers without keeping the port from being read. What is said to a host that has gone is lost.
func (g *guestEnd) onWord(question word) error {
	s := g.session()
	if s == nil {
		return nil
	}
	g.wg.Go(func() {
		code, answer, after := g.answer(question.kind, question.payload)
		g.out.mu.Lock()
		if g.current == s {
			g.out.buf = append(g.out.buf, word{code, question.tag, answer}.bytes()...)
		}
		g.out.mu.Unlock()
		_ = g.out.flush() // a port that fails shows it on reading
		if after != nil {
			after()
		}
	})
	return nil
}

// replace ends the session there is, answers the host with n, and has s in its place. Nothing of the old session
// is written after the answer.
func (g *guestEnd) replace(s *guestSession, n *nonce) error {
	g.out.mu.Lock()
	old := g.current
	g.current = s
	g.out.buf, g.out.err = g.out.buf[:0], nil // they were of the old session
	g.out.room.Broadcast()
	if n != nil {
		g.out.buf = append(g.out.buf, reset(*n)...)
	}
	g.out.mu.Unlock()
	var err error
	if n != nil {
		err = g.out.flush()
	}
	if s != nil && err == nil && old.idle() {
		s.before = old
		return nil
	}
	old.close()
	return err
}

// idle tells that nobody waits for the session's end.
func (s *guestSession) idle() bool {
	return s == nil || s.before == nil && (s.mux == nil || s.mux.NumStreams() == 0)
}

// begin takes down the streams of the session before, and sets up those of this one.
func (s *guestSession) begin() (err error) {
	s.before.close()
	s.before = nil
	s.in, s.feed = io.Pipe()
	s.ended = make(chan struct{})
	if s.mux, err = yamux.Server(s, yamuxConfig()); err != nil {
		return err
	}
	s.end.wg.Go(s.accept)
	return nil
}

// close takes down what streams there are of this session and the one before.
func (s *guestSession) close() {
	if s == nil {
		return
	}
	s.before.close()
	if s.mux == nil {
		return
	}
	_ = s.feed.CloseWithError(io.EOF) // cannot fail
	_ = s.mux.Close()                 // it is over whatever it says
	<-s.ended
}

// accept hands the session's streams to the listener.
func (s *guestSession) accept() {
	defer close(s.ended)
	for {
		stream, err := s.mux.AcceptStream()
		if err != nil {
			s.failed()
			return
		}
		select {
		case s.end.streams <- Stream{stream}:
		case <-s.mux.CloseChan():
		case <-s.end.done:
			_ = stream.Close() // the session goes with it
			return
		}
	}
}

// failed tells the host when the session ended by itself, not by a reset.
func (s *guestSession) failed() {
	g := s.end
	g.out.mu.Lock()
	mine := g.current == s
	if mine {
		g.current = nil
		g.out.buf = append(g.out.buf, reset(noSession)...)
	}
	g.out.mu.Unlock()
	if mine {
		_ = s.feed.CloseWithError(io.EOF) // cannot fail
		_ = g.out.flush()                 // a port that fails shows it on reading
	}
}

// Read is how the session reads the port.
func (s *guestSession) Read(p []byte) (int, error) { return s.in.Read(p) }

// Write is how the session writes on the port.
func (s *guestSession) Write(p []byte) (int, error) {
	o := s.end.out
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.buf) >= outboxMost && s.end.current == s && o.err == nil {
		o.room.Wait()
	}
	switch {
	case s.end.current != s:
		return 0, io.ErrClosedPipe
	case o.err != nil:
		return 0, o.err
	}
	o.buf = stuff(o.buf, p)
	if !bodyFollows(p) {
		o.nudge()
	}
	return len(p), nil
}

// Close ends the session's reading; the port stays open.
func (s *guestSession) Close() error { return s.in.Close() }
