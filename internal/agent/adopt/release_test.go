package adopt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
)

// What could not be let go is held, noted and guarded until it could; whoever asks is told, and tries as well.
func TestWhatIsStuckIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := still{stuck: 3}
		g := s.guest(t)
		if err := g.hold(t.Context(), forCopy); err != nil {
			t.Fatal(err)
		}
		if _, err := g.Quiesce(t.Context(), &agentv1.QuiesceRequest{Hold: true}); !errors.Is(err, errStuck) {
			t.Errorf("who wants to save it hears %v", err)
		}
		for second := range 3 {
			if holds, err := g.Holds(); !holds || err != nil || g.held == nil || s.guards != 1 || g.starting.TryRLock() {
				t.Errorf("after %d s nobody knows of it: %v, %d guards, %v", second, holds, s.guards, err)
			}
			time.Sleep(againPause)
			synctest.Wait()
		}
		if holds, err := g.Holds(); holds || err != nil || g.held != nil || s.guards != 0 || s.thawed != 1 || !g.starting.TryRLock() {
			t.Errorf("it is held for ever: %v, %d guards, thawed %d times, %v", holds, s.guards, s.thawed, err)
		}
	})
}

// It is not tried for ever, and stays noted: whoever asks later tries once more.
func TestWhatIsStuckForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := still{stuck: 1000}
		g := s.guest(t)
		if err := g.hold(t.Context(), forCopy); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Hour)
		synctest.Wait()
		if tried := 1000 - s.stuck; tried != againMost+1 || !g.late {
			t.Errorf("tried %d times", tried)
		}
		s.stuck, s.machine = 0, "what it was made since"
		if _, err := g.Quiesce(t.Context(), &agentv1.QuiesceRequest{Hold: true}); err != nil || s.frozen != 2 || s.thawed != 1 {
			t.Errorf("frozen %d times, thawed %d times, %v", s.frozen, s.thawed, err)
		}
		if err := g.release(); err != nil {
			t.Error(err)
		}
	})
}

// What stood still when not all could be stopped goes on, or is stuck as after any hold.
func TestFreezeThatFailedHalfWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s still
		g := s.guest(t)
		broken := errors.New("broken")
		g.Freeze = func(_ context.Context, _ int, note func(string) error) (func() error, error) {
			return nil, errors.Join(broken, note("/user.slice"))
		}
		s.stuck = 1
		if err := g.hold(t.Context(), forCopy); !errors.Is(err, broken) || !errors.Is(err, errStuck) || g.held == nil {
			t.Errorf("got %v", err)
		}
		time.Sleep(againPause)
		synctest.Wait()
		if g.held != nil || len(s.noted) != 1 || s.guards != 0 {
			t.Errorf("%q were let go, %d guards", s.noted, s.guards)
		}
	})
}

// Where there are no control groups there is nothing to thaw, and nothing to thaw by: programs may be started again.
func TestNothingWasFrozen(t *testing.T) {
	none := errors.New("the control groups cannot be mounted")
	s := still{err: none, stuck: 1000}
	g := s.guest(t)
	if err := g.hold(t.Context(), forCopy); !errors.Is(err, none) || errors.Is(err, errStuck) || g.held != nil || !g.starting.TryRLock() {
		t.Errorf("it is held for ever: %v", err)
	}
	s.err = fmt.Errorf("no groups: %w", errors.ErrUnsupported)
	dead := s.guest(t)
	if err := dead.hold(t.Context(), forCopy); err != nil {
		t.Fatal(err)
	}
	next := s.guest(t)
	next.Dir = dead.Dir
	if err := next.TakeOver(); err != nil || next.held != nil || !next.starting.TryRLock() {
		t.Errorf("the next agent holds it for ever: %v", err)
	}
}

// A dead disk holds up programs for a moment; the kernel is asked once, and its answer is heard when it comes.
func TestDeadDiskIsTriedAgain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var s still
		g := s.guest(t)
		if err := g.hold(t.Context(), forCopy); err != nil {
			t.Fatal(err)
		}
		file, err := os.Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		answer, asked := make(chan error), 0
		g.held.disks = []*frozenDisk{{file: file, letGo: func() error { asked++; return <-answer }}}
		g.turn.Lock()
		err = g.release()
		g.turn.Unlock()
		if !errors.Is(err, context.DeadlineExceeded) || s.thawed != 1 || g.held == nil || !g.starting.TryRLock() {
			t.Errorf("programs ran on %d times: %v", s.thawed, err)
		}
		g.starting.RUnlock()
		time.Sleep(againPause / 2)
		answer <- unix.EINVAL // it goes on already
		time.Sleep(againPause)
		synctest.Wait()
		if holds, err := g.Holds(); holds || err != nil || asked != 1 || s.thawed != 1 || g.held != nil {
			t.Errorf("asked %d times, thawed %d times, holds %v, %v", asked, s.thawed, holds, err)
		}
		if !g.starting.TryRLock() {
			t.Error("no program may start")
		}
	})
}

// Who asks again a clone that knows who it is, and whose programs could not be let go, is told, and tries as well.
func TestWhoAsksAgainHearsWhatIsStuck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := still{stuck: 2}
		g := s.guest(t)
		if err := g.hold(t.Context(), forTemplate); err != nil {
			t.Fatal(err)
		}
		if err := g.releaseStuck(); err != nil || s.stuck != 2 {
			t.Errorf("while they rest: %v", err)
		}
		if err := g.release(); !errors.Is(err, errStuck) {
			t.Fatalf("after their rest: %v", err)
		}
		if err := g.releaseStuck(); !errors.Is(err, errStuck) {
			t.Errorf("who asks again hears %v", err)
		}
		if err := g.releaseStuck(); err != nil || g.held != nil || s.thawed != 1 {
			t.Errorf("thawed %d times: %v", s.thawed, err)
		}
	})
}
