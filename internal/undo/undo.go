// Package undo is the rollback stack: a step back is pushed the moment there is something to take
// back, and everything pushed runs in reverse unless Keep was called.
//
//	u := undo.New()
//	defer u.Unwind(ctx, &err)
//	... make the tap ...
//	u.Push("tap", func(ctx context.Context) error { return remove(ctx, tap) })
//	...
//	u.Keep()
//	return nil
package undo

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// StepTimeout bounds one step back.
const StepTimeout = 10 * time.Second

type step struct {
	name string
	back func(context.Context) error
}

// Stack holds the steps back. It belongs to one goroutine.
type Stack struct {
	steps    []step
	finished bool
}

// New returns an empty stack.
func New() *Stack { return &Stack{} }

// Push adds a step back. Pushing on a finished stack would lose the step, so it panics.
func (s *Stack) Push(name string, back func(context.Context) error) {
	if s.finished {
		panic("undo: push of " + name + " on a finished stack")
	}
	s.steps = append(s.steps, step{name, back})
}

// Keep drops the steps: what was made stays.
func (s *Stack) Keep() {
	s.steps = nil
	s.finished = true
}

// Unwind runs the steps in reverse, each for at most StepTimeout and whatever became of ctx, and
// joins their failures to *err. It does nothing after Keep. It is meant to be deferred, and runs
// during a panic as well.
func (s *Stack) Unwind(ctx context.Context, err *error) {
	s.finished = true
	ctx = context.WithoutCancel(ctx)
	for i := len(s.steps) - 1; i >= 0; i-- {
		if e := runStep(ctx, s.steps[i]); e != nil {
			*err = errors.Join(*err, e)
		}
	}
	s.steps = nil
}

func runStep(ctx context.Context, st step) error {
	ctx, cancel := context.WithTimeout(ctx, StepTimeout)
	defer cancel()
	if err := st.back(ctx); err != nil {
		return fmt.Errorf("undo %s: %w", st.name, err)
	}
	return nil
}
