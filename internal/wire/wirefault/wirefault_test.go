package wirefault

import (
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"
	"testing"

	"connectrpc.com/connect"
	"pgregory.net/rapid"

	"banger/internal/fault"
)

func TestRoundTrip(t *testing.T) {
	kinds := []fault.Kind{
		fault.Unexpected, fault.Usage, fault.NotFound, fault.Conflict, fault.Precondition, fault.Timeout, fault.Interrupted,
	}
	rapid.Check(t, func(t *rapid.T) {
		sent := &fault.Error{
			Kind: rapid.SampledFrom(kinds).Draw(t, "kind"), Text: rapid.String().Draw(t, "text"), Hint: rapid.String().Draw(t, "hint"),
		}
		if rapid.Bool().Draw(t, "caused") {
			sent.Cause = errors.New(rapid.String().Draw(t, "cause"))
		}
		var err error = sent
		if rapid.Bool().Draw(t, "wrapped") {
			err = fmt.Errorf("outside: %w", err)
		}
		var got *fault.Error
		if !errors.As(FromConnect(ToConnect(err)), &got) {
			t.Fatal("no fault came back")
		}
		if got.Kind != sent.Kind || got.Error() != err.Error() || got.Hint != sent.Hint {
			t.Errorf("sent %v, got %v", err, got)
		}
	})
}

func TestOtherErrors(t *testing.T) {
	for _, test := range []struct {
		err  error
		want fault.Kind
	}{
		{connect.NewError(connect.CodeResourceExhausted, errors.New("too large")), fault.Usage},
		{connect.NewError(connect.CodeUnavailable, errors.New("gone")), fault.Precondition},
		{connect.NewError(connect.CodeDeadlineExceeded, errors.New("late")), fault.Timeout},
		{connect.NewError(connect.CodeCanceled, context.Canceled), fault.Interrupted},
		{connect.NewError(connect.CodeUnknown, errors.New("what")), fault.Unexpected},
		{ToConnect(errors.New("plain")), fault.Unexpected},
		{ToConnect(fmt.Errorf("waiting: %w", context.DeadlineExceeded)), fault.Timeout},
		{context.Canceled, fault.Interrupted},
	} {
		got := FromConnect(test.err)
		var f *fault.Error
		if !errors.As(got, &f) || f.Kind != test.want {
			t.Errorf("%v became %v (%s), want %s", test.err, got, fault.KindOf(got), test.want)
		}
	}
	for _, err := range []error{nil, io.EOF} {
		if got := FromConnect(err); got != err {
			t.Errorf("%v became %v", err, got)
		}
	}
}

// TestBroke: what the other side says that it could not do is no loss.
func TestBroke(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{connect.NewError(connect.CodeUnavailable, errors.New("connection refused")), true},
		{connect.NewError(connect.CodeUnknown, fmt.Errorf("read message: %w", io.ErrUnexpectedEOF)), true},
		{connect.NewError(connect.CodeInternal, errors.New("no room for the host key")), false},
		{connect.NewError(connect.CodeFailedPrecondition, errors.New("busy")), false},
		{connect.NewError(connect.CodeUnknown, fmt.Errorf("read message: %w", syscall.ECONNRESET)), true},
		{connect.NewError(connect.CodeUnknown, io.EOF), false},
		{nil, false},
	} {
		if got := Broke(c.err); got != c.want {
			t.Errorf("%v: got %v", c.err, got)
		}
	}
}
