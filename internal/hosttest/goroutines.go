package hosttest

import (
	"fmt"
	"os"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// Goroutines waits until none are left but those of the options, and returns those that stay. Which are about to end may
// need their turn on a processor: goleak alone gives them half a second.
func Goroutines(options ...goleak.Option) (err error) {
	for deadline := time.Now().Add(settle); time.Now().Before(deadline); {
		if err = goleak.Find(options...); err == nil {
			return nil
		}
	}
	return err
}

// Main runs a package's tests, and fails when they leave goroutines behind. It does not return.
func Main(m interface{ Run() int }) {
	code := m.Run()
	if code == 0 {
		if err := Goroutines(); err != nil {
			fmt.Fprintln(os.Stderr, "the tests left goroutines behind:", err)
			code = 1
		}
	}
	os.Exit(code)
}

// NoGoroutines fails a test that leaves any but those of the options.
func NoGoroutines(t testing.TB, options ...goleak.Option) {
	t.Helper()
	if err := Goroutines(options...); err != nil {
		t.Errorf("the test left goroutines behind: %v", err)
	}
}
