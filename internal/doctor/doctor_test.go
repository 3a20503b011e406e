package doctor

import (
	"context"
	"testing"
	"time"

	"banger/internal/fault"
)

func TestRunKeepsOrderAndHints(t *testing.T) {
	reports := Run(context.Background(), []Check{
		{Name: "good", Hint: "never shown", Run: func(context.Context) Result { return Good("fine") }},
		{Name: "slow", Hint: "of the check", Run: func(context.Context) Result { return Warn("slow", "") }},
		{Name: "gone", Hint: "of the check", Run: func(context.Context) Result {
			return Fail(fault.New(fault.Precondition, "no tool").WithHint("of the fault"))
		}},
		{Name: "bug", Run: func(context.Context) Result { panic("oh") }},
	})
	want := []Report{
		{Name: "good", Result: Result{OKStatus, "fine", ""}},
		{Name: "slow", Result: Result{Warning, "slow", "of the check"}},
		{Name: "gone", Result: Result{MissingStatus, "no tool", "of the fault"}},
		{Name: "bug", Result: Result{MissingStatus, "the check panicked: oh", ""}},
	}
	for i, w := range want {
		if reports[i] != w {
			t.Errorf("report %d = %+v, want %+v", i, reports[i], w)
		}
	}
	if OK(reports) || !OK(reports[:2]) {
		t.Error("only what is missing makes the whole not OK")
	}
}

func TestRunOneHasADeadline(t *testing.T) {
	stuck := make(chan struct{})
	defer close(stuck)
	c := Check{Name: "stuck", Run: func(context.Context) Result { <-stuck; return Good("") }}
	if r := runOne(context.Background(), c, 10*time.Millisecond); r.Status != MissingStatus {
		t.Errorf("a check that hangs is reported as %s", r.Status)
	}
}
