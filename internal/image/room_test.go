package image

import (
	"runtime/debug"
	"testing"
)

// TestElbowRoom: while images are made the daemon's memory limit does not hold, and afterwards it does.
func TestElbowRoom(t *testing.T) {
	const limit = 1 << 30
	before := debug.SetMemoryLimit(limit)
	defer debug.SetMemoryLimit(before)
	one, two := elbowRoom(), elbowRoom()
	for what, leave := range map[string]func(){"the first": one, "the second": two} {
		if got := debug.SetMemoryLimit(-1); got <= limit {
			t.Errorf("before %s is done: %d", what, got)
		}
		leave()
	}
	if got := debug.SetMemoryLimit(-1); got != limit {
		t.Errorf("when all are done: %d", got)
	}
}
