// Package doctor is how banger examines something: checks with a name and a hint, run side by
// side, each within a deadline. It prints nothing and knows nothing of what is examined.
package doctor

import (
	"context"
	"fmt"
	"sync"
	"time"

	"banger/internal/fault"
)

// Limit bounds one check.
const Limit = 10 * time.Second

// Status is the outcome of a check.
type Status string

// The statuses.
const (
	OKStatus      Status = "ok"
	Warning       Status = "warning" // works, but worse than it could
	MissingStatus Status = "missing" // something needed is not there
)

// Check examines one thing.
type Check struct {
	Name string
	// Run looks and changes nothing. It must return soon after ctx ends.
	Run func(ctx context.Context) Result
	// Hint is what to do when the result is not OK and has no hint of its own.
	Hint string
	// Fix mends it; nil when banger cannot.
	Fix func(ctx context.Context) error
}

// Result is what a check found.
type Result struct {
	Status  Status
	Message string
	Hint    string
}

// Report is a check's name with its result; Hint is empty when all is well.
type Report struct {
	Name string
	Result
	Fixable bool
}

// Good is the result of a check that found all well.
func Good(message string) Result { return Result{Status: OKStatus, Message: message} }

// Note is Good for something merely worth knowing.
func Note(message string) Result { return Good(message) }

// Warn is the result for what works worse than it could. An empty hint means the check's.
func Warn(message, hint string) Result {
	return Result{Status: Warning, Message: message, Hint: hint}
}

// Missing is the result for something needed that is not there. An empty hint means the check's.
func Missing(message, hint string) Result {
	return Result{Status: MissingStatus, Message: message, Hint: hint}
}

// Fail makes a Missing of an error, with the hint of the fault in it.
func Fail(err error) Result { return Missing(err.Error(), fault.HintOf(err)) }

// OK tells whether nothing needed is missing.
func OK(reports []Report) bool {
	for _, r := range reports {
		if r.Status == MissingStatus {
			return false
		}
	}
	return true
}

// Run runs all checks side by side and returns their reports in the order given. A check that does
// not return within Limit, or panics, is reported as missing.
func Run(ctx context.Context, checks []Check) []Report {
	reports := make([]Report, len(checks))
	var wg sync.WaitGroup
	for i, c := range checks {
		wg.Go(func() { reports[i] = runOne(ctx, c, Limit) })
	}
	wg.Wait()
	return reports
}

func runOne(ctx context.Context, c Check, limit time.Duration) Report {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	results := make(chan Result, 1)
	go func() { results <- guarded(ctx, c) }()
	var r Result
	select {
	case r = <-results:
	case <-ctx.Done():
		r = Missing("the check did not end in time", "")
	}
	if r.Status == OKStatus {
		r.Hint = ""
	} else if r.Hint == "" {
		r.Hint = c.Hint
	}
	return Report{Name: c.Name, Result: r, Fixable: c.Fix != nil}
}

func guarded(ctx context.Context, c Check) (r Result) {
	defer func() {
		if p := recover(); p != nil {
			r = Missing(fmt.Sprintf("the check panicked: %v", p), "")
		}
	}()
	return c.Run(ctx)
}
