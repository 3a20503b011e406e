package vm

import (
	"testing"

	"pgregory.net/rapid"

	"banger/internal/fault"
)

var (
	allStates = []State{Stopped, Starting, Running, Stopping, Paused, Suspending, Suspended, Resuming, Reverting, Failed, Deleting, Gone}
	allEvents = []Event{
		AskStart, AskBoot, AskResume, AskSuspend, AskStop, AskDelete, AskCopy, AskRevert,
		Booted, BootFailed, TakenDown, Exited, Died, Erased, Saved, SaveFailed, Copied,
	}
)

// The whole table, written a second time: what is not here is refused.
func TestTable(t *testing.T) {
	want := map[State]map[Event]string{
		Stopped:    {AskStart: "starting/bring up", AskBoot: "starting/bring up", AskStop: "stopped/", AskDelete: "deleting/erase", AskCopy: "stopped/copy", AskRevert: "reverting/revert"},
		Starting:   {AskStart: "starting/", AskBoot: "starting/", AskStop: "stopping/take down", Booted: "running/", BootFailed: "failed/", Died: "failed/take down", Exited: "stopping/take down"},
		Running:    {AskStart: "running/", AskBoot: "running/", AskSuspend: "suspending/save", AskCopy: "paused/copy", AskRevert: "reverting/revert", AskStop: "stopping/take down", Exited: "stopping/take down", Died: "failed/take down"},
		Reverting:  {TakenDown: "stopped/", Saved: "suspended/"},
		Paused:     {Copied: "running/", AskStop: "stopping/take down", Exited: "stopping/take down", Died: "failed/take down"},
		Suspending: {AskSuspend: "suspending/", Saved: "suspended/take down", SaveFailed: "running/", Died: "failed/take down"},
		Suspended: {
			AskStart: "resuming/restore", AskResume: "resuming/restore", AskBoot: "starting/bring up", AskSuspend: "suspended/",
			AskStop: "stopped/take down", AskDelete: "deleting/erase", TakenDown: "suspended/",
			AskCopy: "suspended/copy", AskRevert: "reverting/revert",
		},
		Resuming: {AskStart: "resuming/", AskResume: "resuming/", Booted: "running/", BootFailed: "suspended/"},
		Stopping: {AskStop: "stopping/", TakenDown: "stopped/", Exited: "stopping/", Died: "stopping/"},
		Failed:   {AskStart: "starting/bring up", AskBoot: "starting/bring up", AskStop: "stopped/take down", AskDelete: "deleting/erase", TakenDown: "failed/", AskCopy: "failed/copy", AskRevert: "reverting/revert"},
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
			case BringUp, Restore:
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
			if act == TakeDown || act == Revert || to == Stopped || event == BootFailed && err == nil {
				up = false
			}
			switch {
			case act == Save && !up:
				t.Fatalf("saved without having been brought up: %s + %s", state, event)
			case to == Resuming && state != Suspended && state != Resuming:
				t.Fatalf("resumed without saved memory: %s + %s", state, event)
			case to == Suspended && state != Suspended && state != Resuming && event != Saved:
				t.Fatalf("suspended without having been saved: %s + %s", state, event)
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
	for state, event := range map[State]Event{
		Stopped: AskStop, Starting: AskStart, Running: AskStart, Stopping: AskStop, Suspending: AskSuspend, Suspended: AskSuspend, Resuming: AskResume,
	} {
		if to, act, err := Next(state, event); err != nil || act != Nothing || to != state {
			t.Errorf("%s + %s = %s/%s, %v", state, event, to, act, err)
		}
	}
}
