package fault

import (
	"context"
	"errors"
	"fmt"
	"testing"
)

func TestKinds(t *testing.T) {
	cause := errors.New("cause")
	for _, c := range []struct {
		err  error
		kind Kind
		code int
		text string
	}{
		{nil, Unexpected, 0, ""},
		{cause, Unexpected, 1, "cause"},
		{New(Usage, "no %s", "name"), Usage, 2, "no name"},
		{Wrap(NotFound, cause, "VM x"), NotFound, 3, "VM x: cause"},
		{fmt.Errorf("above: %w", New(Conflict, "taken")), Conflict, 4, "above: taken"},
		{Wrap(Precondition, New(Usage, "inner"), "outer"), Precondition, 5, "outer: inner"},
		{fmt.Errorf("x: %w", context.DeadlineExceeded), Timeout, 6, "x: context deadline exceeded"},
		{errors.Join(context.Canceled, New(Usage, "second")), Usage, 2, "context canceled\nsecond"},
		{context.Canceled, Interrupted, 130, "context canceled"},
	} {
		if c.err != nil && (KindOf(c.err) != c.kind || c.err.Error() != c.text) {
			t.Errorf("%v: kind %s, want %s, text %q", c.err, KindOf(c.err), c.kind, c.text)
		}
		if got := ExitCode(c.err); got != c.code {
			t.Errorf("%v: exit code %d, want %d", c.err, got, c.code)
		}
	}
	for kind := range names {
		if ParseKind(kind.String()) != kind {
			t.Errorf("%s does not survive the wire", kind)
		}
	}
	if ParseKind("of tomorrow") != Unexpected {
		t.Error("an unknown kind is not unexpected")
	}
}

func TestHintIsFoundInTheChain(t *testing.T) {
	inner := New(Precondition, "no qemu").WithHint("apt install %s", "qemu-system-x86")
	for _, err := range []error{inner, fmt.Errorf("x: %w", inner), Wrap(Conflict, inner, "outer"), errors.Join(errors.New("y"), inner)} {
		if HintOf(err) != "apt install qemu-system-x86" {
			t.Errorf("%v: hint %q", err, HintOf(err))
		}
	}
	if HintOf(nil) != "" || HintOf(errors.New("x")) != "" || HintOf(Wrap(Usage, errors.New("x"), "y")) != "" {
		t.Error("a hint out of nothing")
	}
	if outer := Wrap(Usage, inner, "o").WithHint("first"); HintOf(outer) != "first" || inner.Hint == "first" {
		t.Error("the outermost hint does not win, or the cause was changed")
	}
}
