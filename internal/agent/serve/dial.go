package serve

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"connectrpc.com/connect"

	agentv1 "banger/api/agent/v1"
)

// dialTimeout bounds a connection within the guest, which needs no network.
const dialTimeout = 5 * time.Second

// Conn is a connection whose writing side can be closed alone, as those of TCP.
type Conn interface {
	io.ReadWriteCloser
	CloseWrite() error
}

type dialStream = connect.BidiStream[agentv1.DialRequest, agentv1.DialResponse]

// Dial connects to a port of the guest and passes bytes both ways.
func (s *service) Dial(ctx context.Context, stream *dialStream) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	port := first.GetStart().GetPort()
	if port == 0 || port > 0xffff {
		return connect.NewError(connect.CodeInvalidArgument, errors.New("the first request of dial must name a port"))
	}
	if s.o.Dial == nil {
		return unimplemented()
	}
	conn, address, err := s.o.Dial(ctx, uint16(port))
	if err != nil {
		return dialFailed(err)
	}
	defer conn.Close()
	// Both copies end when the call does: nothing else may keep them.
	stop := context.AfterFunc(ctx, func() { _ = conn.Close() })
	defer stop()
	connected := &agentv1.DialResponse{Output: &agentv1.DialResponse_Connected{Connected: &agentv1.DialConnected{Address: address}}}
	if err := stream.Send(connected); err != nil {
		return err
	}
	written := make(chan error, 1)
	go func() { written <- hostToGuest(stream, conn) }()
	if err := guestToHost(conn, stream); err != nil {
		return err
	}
	return <-written
}

// hostToGuest writes what comes over the stream until its end.
func hostToGuest(stream *dialStream, conn Conn) error {
	for {
		r, err := stream.Receive()
		if errors.Is(err, io.EOF) || err == nil && r.GetEof() {
			return ended(conn.CloseWrite())
		}
		if err != nil {
			_ = conn.Close() // the other direction ends as well
			return err
		}
		if _, err := conn.Write(r.GetData()); err != nil {
			return ended(err)
		}
	}
}

// guestToHost sends what the guest's program writes until its end.
func guestToHost(conn Conn, stream *dialStream) error {
	buffer := make([]byte, maxChunk)
	for {
		n, err := conn.Read(buffer)
		if n > 0 {
			if err := stream.Send(&agentv1.DialResponse{Output: &agentv1.DialResponse_Data{Data: buffer[:n]}}); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return stream.Send(&agentv1.DialResponse{Output: &agentv1.DialResponse_Eof{Eof: true}})
		}
		if err != nil {
			return ended(err)
		}
	}
}

// ended makes an error of the guest's connection one of the call. A program that reset it, or does not read
// any more, has ended its side.
func ended(err error) error {
	switch {
	case err == nil, errors.Is(err, syscall.EPIPE), errors.Is(err, syscall.ENOTCONN), errors.Is(err, net.ErrClosed):
		return nil
	case errors.Is(err, syscall.ECONNRESET):
		return connect.NewError(connect.CodeAborted, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}

func dialFailed(err error) error {
	switch {
	case errors.Is(err, syscall.ECONNREFUSED):
		return connect.NewError(connect.CodeFailedPrecondition, err)
	case errors.Is(err, os.ErrDeadlineExceeded), errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}

// DialLoopback connects to a port of this very machine: on its loopback addresses, both of which programs mean by
// "localhost". It is what Options.Dial is in a guest.
func DialLoopback(ctx context.Context, port uint16) (Conn, string, error) {
	dialer := net.Dialer{Timeout: dialTimeout}
	var errs []error
	for _, ip := range []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback} {
		conn, err := dialer.DialContext(ctx, "tcp", (&net.TCPAddr{IP: ip, Port: int(port)}).String())
		if err == nil {
			return conn.(*net.TCPConn), conn.RemoteAddr().String(), nil
		}
		errs = append(errs, err)
	}
	return nil, "", errs[0] // the second is only that of a guest without IPv6
}
