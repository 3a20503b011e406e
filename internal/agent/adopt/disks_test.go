package adopt

import (
	"context"
	"errors"
	"os"
	"testing"
	"testing/synctest"
	"time"
)

// A disk that does not answer holds up nobody for long, and what it does at last is taken back.
func TestWithin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		answers := make(chan error)
		late := 0
		begin := time.Now()
		err := within(t.Context(), func() error { return <-answers }, func() { late++ })
		if !errors.Is(err, context.DeadlineExceeded) || time.Since(begin) != diskWait || late != 0 {
			t.Errorf("after %s: %v, late %d", time.Since(begin), err, late)
		}
		answers <- nil
		synctest.Wait()
		if late != 1 {
			t.Error("what came late was not taken back")
		}
		if err := within(t.Context(), func() error { return os.ErrInvalid }, func() { late++ }); !errors.Is(err, os.ErrInvalid) || late != 1 {
			t.Errorf("got %v, late %d", err, late)
		}
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if err := within(ctx, func() error { return <-answers }, func() { late++ }); !errors.Is(err, context.Canceled) {
			t.Errorf("given up: %v", err)
		}
		answers <- nil
	})
}

// What is on no disk of its own is not frozen, and nobody misses it.
func TestNothingToFreeze(t *testing.T) {
	frozen, why, err := freezeDisks(t.Context(), []string{"/proc", "/nowhere/at/all"})
	if len(frozen) > 0 || why != "" || err != nil {
		t.Errorf("%v, %q, %v", frozen, why, err)
	}
	if left, err := thawDisks(frozen); err != nil || len(left) > 0 {
		t.Error(err)
	}
	var nothing *held
	if err := nothing.thawDisks(); err != nil {
		t.Error(err)
	}
}
