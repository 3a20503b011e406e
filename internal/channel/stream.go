package channel

import (
	"io"
	"net"
	"time"

	"github.com/hashicorp/yamux"
)

// Limits of a session. A stream buffers at most a window on each side.
const (
	streamWindow = 256 << 10
	backlog      = 64
	// writeTimeout bounds how long a frame may wait for the pipe. A software-emulated guest under load is slow.
	writeTimeout = 30 * time.Second
	// keepAlive is how often an idle host asks whether the guest is still there.
	keepAlive = 30 * time.Second
)

func yamuxConfig() *yamux.Config {
	c := yamux.DefaultConfig()
	c.AcceptBacklog = backlog
	c.EnableKeepAlive = false
	c.KeepAliveInterval = keepAlive
	c.ConnectionWriteTimeout = writeTimeout
	c.MaxStreamWindowSize = streamWindow
	c.LogOutput = io.Discard
	return c
}

// Stream is one stream of the channel. Unlike yamux's own, its Close ends both directions, as that of
// other connections does; CloseWrite ends only one's own.
type Stream struct{ *yamux.Stream }

var _ net.Conn = Stream{}

// Close ends the stream; a Read that waits returns.
func (s Stream) Close() error {
	err := s.Stream.Close()
	_ = s.SetDeadline(time.Unix(1, 0)) // cannot fail
	return err
}

// CloseWrite tells the other side that nothing more comes.
func (s Stream) CloseWrite() error { return s.Stream.Close() }
