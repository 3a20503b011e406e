package guest

import (
	"context"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
)

const (
	// ClockExact is how far a guest's clock may be off after SetClock.
	ClockExact = 100 * time.Millisecond

	clockAim   = ClockExact / 2 // clocks drift while they are compared
	clockTries = 8
)

// Offset is what is known of how far a guest's clock is ahead of the host's: it is in between. Negative is behind.
type Offset struct{ Least, Most time.Duration }

// Unknown is the offset of a clock that nobody has asked.
var Unknown = Offset{-ages, ages}

const ages = 100 * 365 * 24 * time.Hour

// Heard is the offset of a clock that said so, in nanoseconds since the Unix epoch, to a question that was asked and
// answered at these times of the host's.
func Heard(said int64, asked, answered time.Time) Offset {
	at := time.Unix(0, said)
	return Offset{at.Sub(answered.Round(0)), at.Sub(asked.Round(0))} // wall clocks, also when the host's was stepped
}

// And is what two answers say together; when they do not agree one of the clocks was stepped, and the later counts.
func (o Offset) And(later Offset) Offset {
	both := Offset{max(o.Least, later.Least), min(o.Most, later.Most)}
	if both.Least > both.Most {
		return later
	}
	return both
}

// Worst is how far off the clock may be, either way.
func (o Offset) Worst() time.Duration { return max(o.Most, -o.Least) }

func (o Offset) middle() time.Duration { return o.Least + (o.Most-o.Least)/2 }

// SetClock steps the guest's clock until it is known to be the host's to within ClockExact, and returns what is
// known of it at last. It is asked what it says, and moved by what it is off: a step does not become older on its
// way, as a time does. On a host that has too much to do an answer takes long and tells little; then it is asked again,
// some times. known is what an earlier answer tells, or Unknown.
func (c *Client) SetClock(ctx context.Context, now func() time.Time, known Offset) (Offset, error) {
	return setClock(ctx, c.SetTime, now, known)
}

func setClock(ctx context.Context, ask func(context.Context, *agentv1.SetTimeRequest) (*agentv1.SetTimeResponse, error),
	now func() time.Time, known Offset,
) (Offset, error) {
	for range clockTries {
		if known.Worst() <= clockAim {
			return known, nil
		}
		var step time.Duration
		if width := known.Most - known.Least; width <= 2*ClockExact || width < known.Worst()/4 {
			step = -known.middle() // else there is more to learn first: programs need not see it go to and fro
		}
		asked := now()
		r, err := ask(ctx, &agentv1.SetTimeRequest{StepNanos: int64(step)})
		if err != nil {
			return known, err
		}
		known = Offset{known.Least + step, known.Most + step}.And(Heard(r.GetUnixNanos(), asked, now()))
	}
	if worst := known.Worst(); worst > ClockExact {
		return known, fault.New(fault.Timeout, "the guest answers too slowly to set its clock: it may be %s off", worst.Round(time.Millisecond))
	}
	return known, nil
}
