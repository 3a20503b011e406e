package guest

import (
	"context"
	"errors"
	"testing"
	"time"

	"pgregory.net/rapid"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
)

// slowClock is a guest whose clock is off, and whose questions and answers take their time.
type slowClock struct {
	time  time.Time // the host's
	ahead time.Duration
	ways  []time.Duration // there, back, there, back...; the last two again and again
	asked int
	fail  error
}

func (c *slowClock) SetTime(_ context.Context, r *agentv1.SetTimeRequest) (*agentv1.SetTimeResponse, error) {
	c.asked++
	there, back := c.ways[0], c.ways[1]
	if len(c.ways) > 2 {
		c.ways = c.ways[2:]
	}
	c.ahead += time.Duration(r.GetStepNanos())
	said := c.time.Add(there + c.ahead)
	c.time = c.time.Add(there + back)
	return &agentv1.SetTimeResponse{StepNanos: r.GetStepNanos(), UnixNanos: said.UnixNano()}, c.fail
}

func (c *slowClock) set(known Offset) (Offset, error) {
	return setClock(context.Background(), c.SetTime, func() time.Time { return c.time }, known)
}

// However slow the ways are: as soon as some questions are answered in time the clock is right, and what is said of
// it is never better than it is.
func TestSetClock(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := &slowClock{time: time.Now(), ahead: time.Duration(rapid.Int64Range(-int64(ages)/2, int64(ages)/2).Draw(t, "ahead"))}
		for _, way := range rapid.SliceOfN(rapid.Int64Range(0, int64(3*time.Second)), 0, clockTries-2).Draw(t, "slow") {
			c.ways = append(c.ways, time.Duration(way), time.Duration(way)/3)
		}
		quick := time.Duration(rapid.Int64Range(0, int64(clockAim)).Draw(t, "quick"))
		c.ways = append(c.ways, quick, clockAim-quick)
		known, err := c.set(Unknown)
		if err != nil || known.Worst() > ClockExact || c.ahead < known.Least || c.ahead > known.Most {
			t.Fatalf("%v ahead after %d questions, known as %v, %v", c.ahead, c.asked, known, err)
		}
	})
}

// What Adopt has told may be enough: then nothing is asked.
func TestSetClockThatIsRight(t *testing.T) {
	c := &slowClock{ways: []time.Duration{0, 0}}
	if _, err := c.set(Offset{Least: -clockAim}); err != nil || c.asked != 0 {
		t.Errorf("asked %d times, %v", c.asked, err)
	}
}

func TestSetClockInVain(t *testing.T) {
	c := &slowClock{time: time.Now(), ahead: time.Hour, ways: []time.Duration{time.Second, time.Second}}
	if _, err := c.set(Unknown); fault.KindOf(err) != fault.Timeout || c.asked != clockTries || c.ahead > 2*time.Second {
		t.Errorf("asked %d times, %v ahead, %v", c.asked, c.ahead, err)
	}
	c.fail = errors.New("hung up")
	if _, err := c.set(Unknown); !errors.Is(err, c.fail) {
		t.Errorf("got %v", err)
	}
}

// A clock that somebody else steps meanwhile: what was known before counts no more.
func TestOffsetsThatDisagree(t *testing.T) {
	before, later := Offset{-10, 10}, Offset{50, 70}
	if got := before.And(later); got != later {
		t.Errorf("got %v", got)
	}
	if got := before.And(Offset{0, 70}); got != (Offset{0, 10}) {
		t.Errorf("got %v", got)
	}
}
