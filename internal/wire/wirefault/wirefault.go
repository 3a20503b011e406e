// Package wirefault carries faults over the socket: a fault becomes a Connect error with a
// banger.v1.Fault detail, and what comes from the other side becomes a fault again with the same
// kind, text and hint. It is apart from package wire so that clients need not link the stores.
package wirefault

import (
	"context"
	"errors"
	"io"
	"net"
	"strings"
	"syscall"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
)

// codes is the Connect code of each kind: for clients that know nothing of the detail, like curl.
var codes = map[fault.Kind]connect.Code{
	fault.Unexpected:   connect.CodeInternal,
	fault.Usage:        connect.CodeInvalidArgument,
	fault.NotFound:     connect.CodeNotFound,
	fault.Conflict:     connect.CodeAlreadyExists,
	fault.Precondition: connect.CodeFailedPrecondition,
	fault.Timeout:      connect.CodeDeadlineExceeded,
	fault.Interrupted:  connect.CodeCanceled,
}

// kinds reads a code that came without a detail: from Connect itself, or from another program.
var kinds = map[connect.Code]fault.Kind{
	connect.CodeCanceled:           fault.Interrupted,
	connect.CodeInvalidArgument:    fault.Usage,
	connect.CodeDeadlineExceeded:   fault.Timeout,
	connect.CodeNotFound:           fault.NotFound,
	connect.CodeAlreadyExists:      fault.Conflict,
	connect.CodeAborted:            fault.Conflict,
	connect.CodePermissionDenied:   fault.Precondition,
	connect.CodeUnauthenticated:    fault.Precondition,
	connect.CodeFailedPrecondition: fault.Precondition,
	connect.CodeOutOfRange:         fault.Usage,
	connect.CodeResourceExhausted:  fault.Usage, // a message above the size limit
	connect.CodeUnimplemented:      fault.Usage,
	connect.CodeUnavailable:        fault.Precondition,
}

// ToConnect makes the error a handler returns. A Connect error of the handler's own passes as it is.
func ToConnect(err error) error {
	if err == nil {
		return nil
	}
	var own *connect.Error
	var f *fault.Error
	if errors.As(err, &own) && !errors.As(err, &f) {
		return own
	}
	kind := fault.KindOf(err)
	e := connect.NewError(codes[kind], errors.New(err.Error()))
	detail, detailErr := connect.NewErrorDetail(&bangerv1.Fault{
		Kind: kind.String(), Message: err.Error(), Hint: fault.HintOf(err),
	})
	if detailErr == nil { // only a message that cannot be marshalled fails, and this one can
		e.AddDetail(detail)
	}
	return e
}

// FromConnect makes the error a client returns: always a *fault.Error, but for nil and io.EOF
// (the end of a stream), which pass.
func FromConnect(err error) error {
	if err == nil || errors.Is(err, io.EOF) {
		return err
	}
	var f *fault.Error
	if errors.As(err, &f) {
		return err
	}
	var e *connect.Error
	if !errors.As(err, &e) {
		return fault.Wrap(fault.KindOf(err), err, "the call failed")
	}
	if f := fromDetails(e); f != nil {
		return f
	}
	return fromCode(e)
}

// Broke tells whether err, of a client's call, is no answer of the daemon, or of a guest's agent, but the loss of it: the
// connection ended, as it does when the daemon is killed or a machine ends. It may be asked again; what the other side says
// that it could not do is no loss.
func Broke(err error) bool {
	var e *connect.Error
	if !errors.As(err, &e) || connect.IsWireError(err) || errors.Is(err, io.EOF) { // EOF is a stream's orderly end
		return false
	}
	if e.Code() == connect.CodeUnavailable {
		return true
	}
	for _, end := range []error{io.ErrUnexpectedEOF, net.ErrClosed, syscall.ECONNRESET, syscall.EPIPE} {
		if errors.Is(err, end) {
			return true
		}
	}
	return e.Code() == connect.CodeInternal && strings.Contains(e.Message(), "incomplete envelope")
}

func fromDetails(e *connect.Error) *fault.Error {
	for _, detail := range e.Details() {
		value, err := detail.Value()
		if err != nil {
			continue // a detail of a newer daemon: the code still tells enough
		}
		if m, ok := value.(*bangerv1.Fault); ok {
			return &fault.Error{Kind: fault.ParseKind(m.Kind), Text: m.Message, Hint: m.Hint}
		}
	}
	return nil
}

func fromCode(e *connect.Error) *fault.Error {
	kind, known := kinds[e.Code()]
	if !known {
		kind = fault.Unexpected
	}
	switch {
	case errors.Is(e, context.DeadlineExceeded) || kind == fault.Timeout:
		return fault.New(fault.Timeout, "the daemon did not answer in time").
			WithHint("banger daemon status tells what it does; banger daemon restart starts it anew, VMs run on")
	case kind == fault.Interrupted:
		return fault.New(fault.Interrupted, "interrupted")
	case e.Code() == connect.CodeUnavailable || Broke(e):
		return fault.New(fault.Precondition, "the connection to the daemon broke: %s", e.Message()).
			WithHint("banger daemon logs may tell why; the next command starts the daemon again")
	case e.Code() == connect.CodeUnimplemented:
		return fault.New(kind, "the daemon does not know this call: %s", e.Message()).
			WithHint("banger daemon restart starts the daemon that belongs to this banger")
	}
	return fault.New(kind, "%s", e.Message())
}
