package engine

import (
	"errors"
	"fmt"
	"io"
	"testing"

	"connectrpc.com/connect"
)

// TestOnlyBrokenStreamsAreOpenedAgain: what the agent says it could not do is not asked again.
func TestOnlyBrokenStreamsAreOpenedAgain(t *testing.T) {
	for _, c := range []struct {
		err  error
		want bool
	}{
		{connect.NewError(connect.CodeUnavailable, errors.New("connection refused")), true},
		{connect.NewError(connect.CodeUnknown, fmt.Errorf("read message: %w", io.ErrUnexpectedEOF)), true},
		{connect.NewError(connect.CodeInternal, errors.New("no room for the host key")), false},
		{connect.NewError(connect.CodeFailedPrecondition, errors.New("busy")), false},
		{nil, false},
	} {
		if got := broke(c.err); got != c.want {
			t.Errorf("%v: got %v", c.err, got)
		}
	}
}
