// Package progress is how a long operation tells what it is doing: named stages that start, say
// something, and end. The same stage names appear in the client's display, the daemon's log, the
// event history, the timings and the bench.
package progress

import "time"

// Status is what happened to a stage.
type Status string

// The statuses.
const (
	Started Status = "started"
	Update  Status = "update"
	Done    Status = "done"
	Failed  Status = "failed"
	Notice  Status = "notice" // not tied to a stage: a slower path, a default chosen
)

// Event is one thing told.
type Event struct {
	Stage    string
	Status   Status
	Message  string
	Fraction float64       // 0 to 1; negative when unknown
	Duration time.Duration // of the whole stage, for Done and Failed
}

// Sink takes events. It must not block for long and may be nil.
type Sink func(Event)

// Send gives e to the sink, if there is one.
func (s Sink) Send(e Event) {
	if s != nil {
		s(e)
	}
}

// Notices is the sink of something that is a part of a stage: only what it notices is told.
func (s Sink) Notices() Sink {
	return func(e Event) {
		if e.Status == Notice {
			s.Send(e)
		}
	}
}

// Notice tells something outside any stage.
func (s Sink) Notice(message string) {
	s.Send(Event{Status: Notice, Message: message, Fraction: -1})
}

// Update tells something within a stage; fraction is negative when unknown.
func (s Sink) Update(stage, message string, fraction float64) {
	s.Send(Event{Stage: stage, Status: Update, Message: message, Fraction: fraction})
}

// Run runs one stage: Started before, Done or Failed with the duration after.
func (s Sink) Run(stage string, f func() error) error {
	s.Send(Event{Stage: stage, Status: Started, Fraction: -1})
	begin := time.Now()
	err := f()
	e := Event{Stage: stage, Status: Done, Fraction: 1, Duration: time.Since(begin)}
	if err != nil {
		e.Status, e.Message, e.Fraction = Failed, err.Error(), -1
	}
	s.Send(e)
	return err
}
