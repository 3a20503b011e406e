package serve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/channel"
)

// prefaceWait is how long a stream may take to say what it speaks.
const prefaceWait = 30 * time.Second

// splitter accepts the streams of a listener: words are answered here, all others are for HTTP.
type splitter struct {
	net.Listener
	handler agentv1connect.AgentServiceHandler
	http    chan net.Conn
	failed  chan struct{} // closed when nothing more is accepted
	err     error         // why

	ctx    context.Context
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

func split(ctx context.Context, l net.Listener, h agentv1connect.AgentServiceHandler) *splitter {
	ctx, cancel := context.WithCancel(ctx)
	s := &splitter{Listener: l, handler: h, http: make(chan net.Conn), failed: make(chan struct{}), ctx: ctx, cancel: cancel}
	s.wg.Go(s.run)
	return s
}

// end ends what is answered here, once the listener is closed.
func (s *splitter) end() {
	s.cancel()
	s.wg.Wait()
}

func (s *splitter) run() {
	defer close(s.failed)
	for {
		c, err := s.Listener.Accept()
		if err != nil {
			s.err = err
			return
		}
		s.wg.Go(func() { s.sort(c) })
	}
}

// sort finds out what a stream speaks.
func (s *splitter) sort(c net.Conn) {
	hangUp := context.AfterFunc(s.ctx, func() { _ = c.Close() }) // nobody to tell, here and below
	_ = c.SetReadDeadline(time.Now().Add(prefaceWait))           // a failure shows on reading
	var preface [len(channel.WordsPreface)]byte
	n, err := io.ReadFull(c, preface[:])
	_ = c.SetReadDeadline(time.Time{})
	if err == nil && string(preface[:]) == channel.WordsPreface {
		answerWords(s.ctx, c, s.handler)
	} else if n > 0 && hangUp() {
		select {
		case s.http <- &begun{c, preface[:n]}: // which knows what to say to a stream that is too short
			return
		case <-s.failed:
		case <-s.ctx.Done():
		}
	}
	hangUp()
	_ = c.Close()
}

// Accept returns the next stream that is not of words.
func (s *splitter) Accept() (net.Conn, error) {
	select {
	case c := <-s.http:
		return c, nil
	case <-s.failed:
		return nil, s.err
	}
}

// begun is a connection whose first bytes have been read.
type begun struct {
	net.Conn
	first []byte
}

func (b *begun) Read(p []byte) (int, error) {
	if len(b.first) == 0 {
		return b.Conn.Read(p)
	}
	n := copy(p, b.first)
	b.first = b.first[n:]
	return n, nil
}

// answerWords answers one question after the other until the stream ends.
func answerWords(ctx context.Context, c net.Conn, h agentv1connect.AgentServiceHandler) {
	for {
		kind, payload, err := channel.ReadWord(c)
		if err != nil {
			return
		}
		var later []func()
		answer, err := answerWord(context.WithValue(ctx, laterKey{}, &later), h, kind, payload)
		code := byte(0)
		if err != nil {
			code, answer = byte(connect.CodeOf(err)), []byte(message(err))
		}
		err = channel.WriteWord(c, "", code, answer)
		for _, f := range later {
			f()
		}
		if err != nil {
			return
		}
	}
}

type laterKey struct{}

// Later does something once the answer to the question whose context it is has been sent, and at once when that is no
// word.
func Later(ctx context.Context, f func()) {
	if later, ok := ctx.Value(laterKey{}).(*[]func()); ok {
		*later = append(*later, f)
		return
	}
	f()
}

func message(err error) string {
	if said := new(connect.Error); errors.As(err, &said) {
		return said.Message()
	}
	return err.Error()
}

func answerWord(ctx context.Context, h agentv1connect.AgentServiceHandler, kind byte, payload []byte) ([]byte, error) {
	switch kind {
	case channel.WordSetTime:
		return call(ctx, payload, &agentv1.SetTimeRequest{}, h.SetTime)
	case channel.WordAdopt:
		return call(ctx, payload, &agentv1.AdoptRequest{}, h.Adopt)
	}
	return nil, connect.NewError(connect.CodeUnimplemented, fmt.Errorf("this agent does not know word %d", kind))
}

func call[Request, Response proto.Message](ctx context.Context, payload []byte, r Request, f func(context.Context, Request) (Response, error)) ([]byte, error) {
	if err := proto.Unmarshal(payload, r); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	response, err := f(ctx, r)
	if err != nil {
		return nil, err
	}
	return proto.Marshal(response)
}
