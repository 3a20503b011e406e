package guest

import (
	"context"
	"errors"
	"io"
	"sync"

	"connectrpc.com/connect"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/fault"
)

// maxChunk bounds the bytes of one message, so that others on the channel get their turn.
const maxChunk = 32 << 10

// Conn is a TCP connection to a port inside the guest, over the guest channel. Read and Write may be called by one
// goroutine each.
type Conn struct {
	stream *connect.BidiStreamForClientSimple[agentv1.DialRequest, agentv1.DialResponse]
	cancel context.CancelFunc
	rest   []byte
	eof    bool
	once   sync.Once
}

// Dial connects to a port inside the guest, also one that only its loopback has. A Conflict fault says that
// nothing listens there. The connection ends with ctx.
func Dial(ctx context.Context, agent agentv1connect.AgentServiceClient, port uint16) (*Conn, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := agent.Dial(ctx)
	if err != nil {
		cancel()
		return nil, dialFault(err, port)
	}
	c := &Conn{stream: stream, cancel: cancel}
	// The end of the context alone does not reach the agent: while the request is open nothing resets the stream.
	context.AfterFunc(ctx, func() { _ = c.Close() })
	err = stream.Send(&agentv1.DialRequest{Input: &agentv1.DialRequest_Start{Start: &agentv1.DialStart{Port: uint32(port)}}})
	if err == nil || errors.Is(err, io.EOF) { // then Receive tells why
		var first *agentv1.DialResponse
		if first, err = stream.Receive(); err == nil && first.GetConnected() == nil {
			err = errors.New("the agent did not say that it is connected")
		}
	}
	if err != nil {
		_ = c.Close()
		return nil, dialFault(err, port)
	}
	return c, nil
}

func dialFault(err error, port uint16) error {
	code := connect.CodeOf(err)
	if said := new(connect.Error); errors.As(err, &said) {
		err = errors.New(said.Message()) // the kind says what the code did
	}
	switch code {
	case connect.CodeFailedPrecondition:
		return fault.Wrap(fault.Conflict, err, "nothing listens on port %d in the guest", port).
			WithHint("start the service there; it may listen on the guest's localhost")
	case connect.CodeUnimplemented:
		return fault.Wrap(fault.Precondition, err, "the agent in the guest is older than this daemon").
			WithHint("restart the VM: banger vm restart")
	case connect.CodeDeadlineExceeded:
		return fault.Wrap(fault.Timeout, err, "port %d in the guest does not answer", port)
	case connect.CodeCanceled:
		return fault.Wrap(fault.Interrupted, err, "the connection to port %d in the guest was given up", port)
	}
	return fault.Wrap(fault.Unexpected, err, "cannot connect to port %d in the guest", port)
}

// Read returns what the guest's program wrote; io.EOF when it has ended its side.
func (c *Conn) Read(p []byte) (int, error) {
	for len(c.rest) == 0 {
		if c.eof {
			return 0, io.EOF
		}
		r, err := c.stream.Receive()
		if err != nil {
			if errors.Is(err, io.EOF) {
				c.eof = true
			}
			return 0, err
		}
		c.rest, c.eof = r.GetData(), r.GetEof()
	}
	n := copy(p, c.rest)
	c.rest = c.rest[n:]
	return n, nil
}

// Write sends bytes to the guest's program.
func (c *Conn) Write(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		n := min(len(p)-sent, maxChunk)
		if err := c.stream.Send(&agentv1.DialRequest{Input: &agentv1.DialRequest_Data{Data: p[sent : sent+n]}}); err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

// CloseWrite tells the guest's program that nothing more comes.
func (c *Conn) CloseWrite() error {
	return c.stream.Send(&agentv1.DialRequest{Input: &agentv1.DialRequest_Eof{Eof: true}})
}

// Close ends the connection.
func (c *Conn) Close() error {
	var err error
	c.once.Do(func() {
		c.cancel()
		err = errors.Join(c.stream.CloseRequest(), c.stream.CloseResponse())
		if connect.CodeOf(err) == connect.CodeCanceled {
			err = nil // as we wished
		}
	})
	return err
}
