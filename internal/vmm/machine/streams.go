package machine

import (
	"context"
	"net"
	"sync"

	"banger/internal/fault"
)

// streams is the guest channel of a VMM that connects each stream by itself. It remembers them, so that they end
// with the machine.
type streams struct {
	open func(context.Context) (net.Conn, error)

	mu     sync.Mutex
	live   map[*stream]bool
	closed bool
}

type stream struct {
	net.Conn
	of *streams
}

// Open opens a stream.
func (s *streams) Open(ctx context.Context) (net.Conn, error) {
	conn, err := s.open(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = conn.Close() // nobody has used it
		return nil, fault.New(fault.Conflict, "the guest channel is closed")
	}
	c := &stream{Conn: conn, of: s}
	s.live[c] = true
	return c, nil
}

// Close ends all streams.
func (s *streams) Close() error {
	s.mu.Lock()
	s.closed = true
	live := s.live
	s.live = map[*stream]bool{}
	s.mu.Unlock()
	for c := range live {
		_ = c.Conn.Close() // they are unwanted: nothing to learn from the error
	}
	return nil
}

// Close ends the stream.
func (c *stream) Close() error {
	c.of.mu.Lock()
	delete(c.of.live, c)
	c.of.mu.Unlock()
	return c.Conn.Close()
}
