// Package fault holds the errors people see: what went wrong, with which thing, and what to do
// next. A fault has a kind, by which scripts and exit codes tell failures apart, and a hint.
package fault

import (
	"context"
	"errors"
	"fmt"
)

// Kind classes a failure. The numbers are the exit codes of the command line and never change.
type Kind int

// The kinds, with the exit code each one stands for.
const (
	Unexpected   Kind = 1   // our bug
	Usage        Kind = 2   // the request makes no sense as written
	NotFound     Kind = 3   // a thing named does not exist
	Conflict     Kind = 4   // taken, or in the wrong state
	Precondition Kind = 5   // something needed is missing or damaged
	Timeout      Kind = 6   // it did not happen in time
	Interrupted  Kind = 130 // the caller gave up
)

var names = map[Kind]string{
	Unexpected: "unexpected", Usage: "usage", NotFound: "not_found", Conflict: "conflict",
	Precondition: "precondition", Timeout: "timeout", Interrupted: "interrupted",
}

// String returns the kind's name on the wire and in JSON.
func (k Kind) String() string { return names[k] }

// ParseKind is the reverse of String; an unknown name is Unexpected.
func ParseKind(s string) Kind {
	for k, n := range names {
		if n == s {
			return k
		}
	}
	return Unexpected
}

// Error is a failure with a kind and a hint.
type Error struct {
	Kind  Kind
	Text  string // what, about which thing; lower case, no full stop
	Hint  string // what to do next; may be empty
	Cause error  // may be nil; not repeated in Text
}

// Error returns the text and, after a colon, the cause.
func (e *Error) Error() string {
	if e.Cause == nil {
		return e.Text
	}
	return e.Text + ": " + e.Cause.Error()
}

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Cause }

// WithHint returns a copy of e with the hint set.
func (e *Error) WithHint(format string, args ...any) *Error {
	c := *e
	c.Hint = fmt.Sprintf(format, args...)
	return &c
}

// New makes an error of a kind.
func New(k Kind, format string, args ...any) *Error {
	return &Error{Kind: k, Text: fmt.Sprintf(format, args...)}
}

// Wrap adds a kind and a text in front of a cause.
func Wrap(k Kind, cause error, format string, args ...any) *Error {
	return &Error{Kind: k, Text: fmt.Sprintf(format, args...), Cause: cause}
}

// KindOf returns the kind of the outermost fault in err's chain. A context's end is Interrupted or
// Timeout; anything else is Unexpected.
func KindOf(err error) Kind {
	var f *Error
	switch {
	case errors.As(err, &f):
		return f.Kind
	case errors.Is(err, context.Canceled):
		return Interrupted
	case errors.Is(err, context.DeadlineExceeded):
		return Timeout
	}
	return Unexpected
}

// HintOf returns the first hint in err's chain, or "".
func HintOf(err error) string {
	for err != nil {
		var f *Error
		if !errors.As(err, &f) {
			return ""
		}
		if f.Hint != "" {
			return f.Hint
		}
		err = f.Cause
	}
	return ""
}

// ExitCode returns the exit code for err; 0 for nil.
func ExitCode(err error) int {
	if err == nil {
		return 0
	}
	return int(KindOf(err))
}
