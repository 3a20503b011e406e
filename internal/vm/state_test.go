package vm

import (
	"testing"

	"pgregory.net/rapid"

	"banger/internal/fault"
)

var (
	allStates = []State{Stopped, Starting, Running, Stopping, Paused, Suspended, Failed, Deleting, Gone}
	allEvents = []Event{AskStart, AskStop, AskDelete, Booted, BootFailed, TakenDown, Exited, Died, Erased}
)

// The whole table, written a second time: what is not here is refused.
func TestTable(t *testing.T) {
	want := map[State]map[Event]string{
		Stopped:  {AskStart: "starting/bring up", AskStop: "stopped/", AskDelete: "deleting/erase"},
		Starting: {AskStart: "starting/", AskStop: "stopping/take down", Booted: "running/", BootFailed: "failed/", Died: "failed/take down", Exited: "stopping/take down"},
		Running:  {AskStart: "running/", AskStop: "stopping/take down", Exited: "stopping/take down", Died: "failed/take down"},
		Paused:   {AskStop: "stopping/take down", Exited: "stopping/take down", Died: "failed/take down"},
		Stopping: {AskStop: "stopping/", TakenDown: "stopped/", Exited: "stopping/", Died: "stopping/"},
		Suspended: {
			AskStop: "stopped/take down", AskDelete: "deleting/erase",
		},
		Failed:   {AskStart: "starting/bring up", AskStop: "stopped/take down", AskDelete: "deleting/erase", TakenDown: "failed/"},
		Deleting: {AskDelete: "deleting/erase", Erased: "/"},
	}
	for _, s := range allStates {
		for _, e := range allEvents {
			to, act, err := Next(s, e)
			expected, allowed := want[s][e]
			switch {
			case allowed && (err != nil || string(to)+"/"+string(act) != expected):
				t.Errorf("%s + %s = %s/%s, %v; want %s", s, e, to, act, err, expected)
			case !allowed && (fault.KindOf(err) != fault.Conflict || to != s || act != Nothing):
				t.Errorf("%s + %s = %s/%s, %v; want a refusal that changes nothing", s, e, to, act, err)
			}
		}
	}
}

// However events come: a VM is never brought up twice, never erased while it is up, never back from
// gone, and a refusal changes nothing.
func TestRandomWalks(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		state, up := Stopped, false
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			event := rapid.SampledFrom(allEvents).Draw(t, "event")
			to, act, err := Next(state, event)
			if err != nil && (to != state || act != Nothing) {
				t.Fatalf("a refusal of %s changed %s to %s/%s", event, state, to, act)
			}
			if state == Gone && (err == nil || to != Gone) {
				t.Fatalf("back from gone by %s: %s", event, to)
			}
			switch act {
			case BringUp:
				if up {
					t.Fatalf("brought up twice: %s + %s", state, event)
				}
				up = true
			case Erase:
				if up {
					t.Fatalf("erased while up: %s + %s", state, event)
				}
			}
			// The owner takes down before it reports TakenDown, and after a failed boot.
			if act == TakeDown || to == Stopped || event == BootFailed && err == nil {
				up = false
			}
			if to == Running && !up {
				t.Fatalf("running without having been brought up: %s + %s", state, event)
			}
			state = to
		}
	})
}

// Asking for what a state already holds does nothing and succeeds.
func TestAskingTwiceIsHarmless(t *testing.T) {
	for state, event := range map[State]Event{Stopped: AskStop, Starting: AskStart, Running: AskStart, Stopping: AskStop} {
		if to, act, err := Next(state, event); err != nil || act != Nothing || to != state {
			t.Errorf("%s + %s = %s/%s, %v", state, event, to, act, err)
		}
	}
}
