package vm

import "banger/internal/fault"

// State is where a VM is in its life.
type State string

// The states. Starting, Stopping and Deleting are passed through while someone works on the VM.
//
//	               AskStart            Booted
//	┌── stopped ─────────────► starting ──────► running ──┐
//	│     ▲  ▲                    │ BootFailed    │  │ Died
//	│     │  └──── AskStop ── failed ◄────────────│──┘
//	│     └ TakenDown ──── stopping ◄── AskStop ──┘
//	└─ AskDelete ─► deleting ── Erased ─► (gone)
const (
	Stopped   State = "stopped"
	Starting  State = "starting"
	Running   State = "running"
	Stopping  State = "stopping"
	Paused    State = "paused"
	Suspended State = "suspended" // memory on disk, no process
	Failed    State = "failed"
	Deleting  State = "deleting"

	Suspending State = "suspending" // memory is being written; on failure it runs on
	Resuming   State = "resuming"   // from saved memory; on failure it is suspended as before

	Gone State = "" // the row is no more
)

// Event is something asked of a VM or something that happened to it.
type Event string

// The events.
const (
	AskStart   Event = "ask start"
	AskStop    Event = "ask stop"
	AskDelete  Event = "ask delete"
	AskSuspend Event = "ask suspend"

	Booted     Event = "booted"      // bring-up is done, the agent answers
	BootFailed Event = "boot failed" // bring-up failed and was rolled back
	TakenDown  Event = "taken down"  // take-down is done
	Exited     Event = "exited"      // the guest powered itself off
	Died       Event = "died"        // the VMM ended in another way than by our stop
	Erased     Event = "erased"      // nothing of it is left
	Saved      Event = "saved"       // memory and devices are on disk
	SaveFailed Event = "save failed" // nothing was saved, the guest runs on
)

// Act is what a move makes its owner do.
type Act string

// The acts.
const (
	Nothing  Act = ""
	BringUp  Act = "bring up"
	TakeDown Act = "take down"
	Erase    Act = "erase"
	Save     Act = "save"
	Restore  Act = "restore"
)

type move struct {
	to  State
	act Act
}

var moves = map[State]map[Event]move{
	Stopped: {
		AskStart: {Starting, BringUp}, AskStop: {Stopped, Nothing}, AskDelete: {Deleting, Erase},
	},
	Starting: {
		AskStart: {Starting, Nothing}, AskStop: {Stopping, TakeDown},
		Booted: {Running, Nothing}, BootFailed: {Failed, Nothing}, Died: {Failed, TakeDown}, Exited: {Stopping, TakeDown},
	},
	Running: {
		AskStart: {Running, Nothing}, AskStop: {Stopping, TakeDown},
		Exited: {Stopping, TakeDown}, Died: {Failed, TakeDown}, AskSuspend: {Suspending, Save},
	},
	Suspending: {
		AskSuspend: {Suspending, Nothing}, Saved: {Suspended, TakeDown}, SaveFailed: {Running, Nothing},
		AskStop: {Stopping, TakeDown}, Exited: {Stopping, TakeDown}, Died: {Failed, TakeDown},
	},
	Resuming: {
		AskStart: {Resuming, Nothing}, Booted: {Running, Nothing}, BootFailed: {Suspended, Nothing},
		Died: {Suspended, TakeDown}, Exited: {Suspended, TakeDown},
	},
	Paused: {
		AskStop: {Stopping, TakeDown}, Exited: {Stopping, TakeDown}, Died: {Failed, TakeDown},
	},
	Stopping: {
		AskStop: {Stopping, Nothing}, TakenDown: {Stopped, Nothing},
		Exited: {Stopping, Nothing}, Died: {Stopping, Nothing},
	},
	Suspended: {
		AskSuspend: {Suspended, Nothing}, AskStart: {Resuming, Restore}, TakenDown: {Suspended, Nothing},
		AskStop: {Stopped, TakeDown}, AskDelete: {Deleting, Erase},
	},
	Failed: {
		AskStart: {Starting, BringUp}, AskStop: {Stopped, TakeDown}, AskDelete: {Deleting, Erase},
		TakenDown: {Failed, Nothing},
	},
	Deleting: {
		AskDelete: {Deleting, Erase}, Erased: {Gone, Nothing},
	},
}

// Next tells where event e takes a VM in state s, and what its owner must do. It has no clock,
// lock or I/O. A refusal is a Conflict fault and changes nothing; asking for what already holds
// succeeds with act Nothing.
func Next(s State, e Event) (State, Act, error) {
	m, ok := moves[s][e]
	if !ok {
		return s, Nothing, refusal(s, e)
	}
	return m.to, m.act, nil
}

// asked says what an event that is asked for would have done.
var asked = map[Event]string{AskStart: "started", AskStop: "stopped", AskDelete: "deleted", AskSuspend: "suspended"}

func refusal(s State, e Event) error {
	if asked[e] == "" {
		return fault.New(fault.Conflict, "%q happened to a VM that is %s", e, s)
	}
	err := fault.New(fault.Conflict, "a VM that is %s cannot be %s", s, asked[e])
	switch {
	case e == AskDelete && (s == Running || s == Paused || s == Starting):
		return err.WithHint("stop it first, or delete it with --force")
	case s == Stopping || s == Deleting:
		return err.WithHint("wait until that is done, then try again")
	}
	return err
}

// HasProcess tells whether a VM in state s should have a VMM process.
func (s State) HasProcess() bool { return s == Running || s == Paused }
