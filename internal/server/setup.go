package server

import (
	"context"
	"sync"

	"banger/internal/progress"
)

// setups lets one setup run at a time and lets further callers join it.
type setups struct {
	mu      sync.Mutex
	current *setupRun // nil while none is under way
}

// setupRun is one setup with its callers. It is cancelled when the last of them leaves.
type setupRun struct {
	rebuild bool
	cancel  context.CancelFunc
	done    chan struct{}
	result  SetupResult // with err, valid once done is closed
	err     error

	// Guarded by setups.mu.
	ending bool // its last caller has left
	sinks  map[int]progress.Sink
	next   int
	stages []progress.Event // how far each stage is, told to those who join late
}

// join runs setup, or joins the one under way. It returns when that has ended, also when ctx
// ended first and this was the last caller: what was half made is gone then.
func (s *setups) join(ctx context.Context, rebuild bool, sink progress.Sink, setup Setup) (SetupResult, error) {
	if err := s.awaitEnding(ctx); err != nil { // returns with mu held
		return SetupResult{}, err
	}
	run := s.current
	if run != nil && run.rebuild != rebuild {
		s.mu.Unlock()
		return SetupResult{}, errOtherSetup
	}
	if run == nil {
		run = s.begin(ctx, rebuild, setup)
	} else {
		sink.Notice("joining the setup that is under way")
		for _, e := range run.stages {
			sink.Send(e)
		}
	}
	id := run.next
	run.next++
	run.sinks[id] = sink
	s.mu.Unlock()

	select {
	case <-run.done:
		return run.result, run.err
	case <-ctx.Done():
	}
	if s.leave(run, id) {
		<-run.done
	}
	return SetupResult{}, ctx.Err()
}

// awaitEnding waits for the end of a run that was cancelled: whoever comes now wants one that goes on. It
// returns with mu held, but for an error.
func (s *setups) awaitEnding(ctx context.Context) error {
	for {
		s.mu.Lock()
		run := s.current
		if run == nil || !run.ending {
			return nil
		}
		s.mu.Unlock()
		select {
		case <-run.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// begin starts a run; the caller holds mu.
func (s *setups) begin(ctx context.Context, rebuild bool, setup Setup) *setupRun {
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx)) // it may outlive its first caller
	run := &setupRun{rebuild: rebuild, cancel: cancel, done: make(chan struct{}), sinks: map[int]progress.Sink{}}
	s.current = run
	go func() {
		defer cancel()
		run.result, run.err = setup(ctx, rebuild, func(e progress.Event) { s.tell(run, e) })
		s.mu.Lock()
		s.current = nil
		s.mu.Unlock()
		close(run.done)
	}()
	return run
}

// tell passes an event to all callers, and remembers the last one of each stage.
func (s *setups) tell(run *setupRun, e progress.Event) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, sink := range run.sinks {
		sink.Send(e)
	}
	for i := range run.stages {
		if run.stages[i].Stage == e.Stage {
			run.stages[i] = e
			return
		}
	}
	if len(run.stages) < eventBuffer {
		run.stages = append(run.stages, e)
	}
}

// leave takes a caller off the run and tells whether it was the last, in which case the run is cancelled.
func (s *setups) leave(run *setupRun, id int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(run.sinks, id)
	if len(run.sinks) > 0 {
		return false
	}
	run.ending = true
	run.cancel()
	return true
}
