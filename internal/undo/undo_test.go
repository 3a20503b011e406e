package undo

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"pgregory.net/rapid"
)

// Whatever is pushed, and whichever steps fail, all run once, in reverse, and all failures are told.
func TestUnwindRunsAllInReverse(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		fails := rapid.SliceOfN(rapid.Bool(), 0, 12).Draw(t, "fails")
		keep := rapid.Bool().Draw(t, "keep")
		first := errors.New("the reason")
		var ran []int
		err := func() (err error) {
			u := New()
			defer u.Unwind(context.Background(), &err)
			for i, fail := range fails {
				u.Push("step", func(context.Context) error {
					ran = append(ran, i)
					if fail {
						return errors.New("step failed")
					}
					return nil
				})
			}
			if keep {
				u.Keep()
				return nil
			}
			return first
		}()
		if keep {
			if err != nil || len(ran) > 0 {
				t.Fatalf("kept, but %v, %v", err, ran)
			}
			return
		}
		want := make([]int, len(fails))
		failures := 0
		for i, fail := range fails {
			want[len(fails)-1-i] = i
			if fail {
				failures++
			}
		}
		if !slices.Equal(ran, want) || !errors.Is(err, first) || strings.Count(err.Error(), "undo step") != failures {
			t.Fatalf("ran %v, %v", ran, err)
		}
	})
}

func TestUnwindRunsDuringPanic(t *testing.T) {
	ran := false
	func() {
		defer func() { _ = recover() }()
		var err error
		u := New()
		defer u.Unwind(context.Background(), &err)
		u.Push("x", func(context.Context) error { ran = true; return nil })
		panic("boom")
	}()
	if !ran {
		t.Error("nothing was taken back")
	}
}

func TestPushAfterTheEndPanics(t *testing.T) {
	u := New()
	u.Keep()
	defer func() {
		if recover() == nil {
			t.Error("the step was lost in silence")
		}
	}()
	u.Push("late", func(context.Context) error { return nil })
}

// A step outlives the caller's cancellation, but not its own time.
func TestStepHasItsOwnTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		var err error
		u := New()
		u.Push("slow", func(ctx context.Context) error {
			if ctx.Err() != nil {
				t.Error("cancelled by the caller")
			}
			<-ctx.Done()
			return ctx.Err()
		})
		begin := time.Now()
		u.Unwind(ctx, &err)
		if took := time.Since(begin); took != StepTimeout || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("took %s, %v", took, err)
		}
	})
}
