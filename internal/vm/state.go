package vm

import "banger/internal/fault"

// State is where a VM is in its life.
type State string

// The states. Those with an ending in -ing are passed through while someone works on the VM.
//
//	               AskStart            Booted
//	┌── stopped ─────────────► starting ──────► running ──┐
//	│     ▲  ▲                    │ BootFailed    │  │ Died
//	│     │  └──── AskStop ── failed ◄────────────│──┘
//	│     └ TakenDown ──── stopping ◄── AskStop ──┘
//	└─ AskDelete ─► deleting ── Erased ─► (gone)
//
// With its memory on disk:
//
//	           AskSuspend             Saved             AskStart, AskResume            Booted
//	running ──────────────► suspending ─────► suspended ───────────────────► resuming ──────► running
//	   ▲                     │      │          ▲   │  │                         │
//	   └───── SaveFailed ────┘      │ Died     │   │  └── AskStop ─► stopped    │
//	                                ▼          │   └───── AskBoot ─► starting   │
//	                              failed       └────────── BootFailed ──────────┘
//
// Copied while it runs (a snapshot):
//
//	         AskCopy           Copied
//	running ─────────► paused ────────► running
//
// and put back to a snapshot, from whatever state it is in; once in its row that goes on to the end:
//
//	                                     AskRevert              TakenDown
//	running, stopped, failed, suspended ───────────► reverting ───────────► stopped
//	                                                     │ Saved
//	                                                     └───────► suspended, with the snapshot's memory
//
// A machine that ends while its VM is suspending or resuming is one of the failures there: who works on the
// VM tells SaveFailed, and what then holds of a running VM, or BootFailed. Died in suspending is for a
// daemon that finds neither the machine nor its memory.
const (
	Stopped   State = "stopped"
	Starting  State = "starting"
	Running   State = "running"
	Stopping  State = "stopping"
	Paused    State = "paused"    // halted while its disks and memory are copied; whatever happens, it runs on
	Suspended State = "suspended" // memory on disk, no process
	Failed    State = "failed"
	Deleting  State = "deleting"

	Suspending State = "suspending" // memory is being written; on failure it runs on
	Resuming   State = "resuming"   // from saved memory; on failure it is suspended as before

	Reverting State = "reverting" // to a snapshot, which is whole in the VM's directory

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
	AskResume  Event = "ask resume" // only from saved memory
	AskBoot    Event = "ask boot"   // never from saved memory, which is dropped

	AskCopy   Event = "ask copy"   // of disks, and of memory where there is one
	AskRevert Event = "ask revert" // to a snapshot

	Booted     Event = "booted"      // bring-up is done, the agent answers
	BootFailed Event = "boot failed" // bring-up failed and was rolled back
	TakenDown  Event = "taken down"  // take-down is done
	Exited     Event = "exited"      // the guest powered itself off
	Died       Event = "died"        // the VMM ended in another way than by our stop
	Erased     Event = "erased"      // nothing of it is left
	Saved      Event = "saved"       // memory and devices are on disk
	SaveFailed Event = "save failed" // nothing was saved, the guest runs on
	Copied     Event = "copied"      // or not: the guest runs on
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
	Copy     Act = "copy"
	Revert   Act = "revert"
)

type move struct {
	to  State
	act Act
}

var moves = map[State]map[Event]move{
	Stopped: {
		AskStart: {Starting, BringUp}, AskBoot: {Starting, BringUp},
		AskStop: {Stopped, Nothing}, AskDelete: {Deleting, Erase},
		AskCopy: {Stopped, Copy}, AskRevert: {Reverting, Revert},
	},
	Starting: {
		AskStart: {Starting, Nothing}, AskBoot: {Starting, Nothing}, AskStop: {Stopping, TakeDown},
		Booted: {Running, Nothing}, BootFailed: {Failed, Nothing}, Died: {Failed, TakeDown}, Exited: {Stopping, TakeDown},
	},
	Running: {
		AskStart: {Running, Nothing}, AskBoot: {Running, Nothing}, AskStop: {Stopping, TakeDown},
		AskSuspend: {Suspending, Save}, Exited: {Stopping, TakeDown}, Died: {Failed, TakeDown},
		AskCopy: {Paused, Copy}, AskRevert: {Reverting, Revert},
	},
	Suspending: {
		AskSuspend: {Suspending, Nothing},
		Saved:      {Suspended, TakeDown}, SaveFailed: {Running, Nothing}, Died: {Failed, TakeDown},
	},
	Suspended: {
		AskStart: {Resuming, Restore}, AskResume: {Resuming, Restore}, AskBoot: {Starting, BringUp},
		AskSuspend: {Suspended, Nothing}, AskStop: {Stopped, TakeDown}, AskDelete: {Deleting, Erase},
		TakenDown: {Suspended, Nothing},
		AskCopy:   {Suspended, Copy}, AskRevert: {Reverting, Revert},
	},
	Resuming: {
		AskStart: {Resuming, Nothing}, AskResume: {Resuming, Nothing},
		Booted: {Running, Nothing}, BootFailed: {Suspended, Nothing},
	},
	Reverting: {
		TakenDown: {Stopped, Nothing}, Saved: {Suspended, Nothing},
	},
	Paused: {
		Copied:  {Running, Nothing},
		AskStop: {Stopping, TakeDown}, Exited: {Stopping, TakeDown}, Died: {Failed, TakeDown},
	},
	Stopping: {
		AskStop: {Stopping, Nothing}, TakenDown: {Stopped, Nothing},
		Exited: {Stopping, Nothing}, Died: {Stopping, Nothing},
	},
	Failed: {
		AskStart: {Starting, BringUp}, AskBoot: {Starting, BringUp},
		AskStop: {Stopped, TakeDown}, AskDelete: {Deleting, Erase},
		TakenDown: {Failed, Nothing},
		AskCopy:   {Failed, Copy}, AskRevert: {Reverting, Revert},
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
var asked = map[Event]string{
	AskStart: "started", AskBoot: "started", AskResume: "resumed", AskStop: "stopped", AskDelete: "deleted",
	AskSuspend: "suspended", AskCopy: "copied", AskRevert: "put back to a snapshot",
}

func refusal(s State, e Event) error {
	if asked[e] == "" {
		return fault.New(fault.Conflict, "%q happened to a VM that is %s", e, s)
	}
	err := fault.New(fault.Conflict, "a VM that is %s cannot be %s", s, asked[e])
	switch {
	case e == AskDelete && s.busy():
		return err.WithHint("stop it first, or delete it with --force")
	case s == Stopping || s == Deleting || s == Starting || s == Suspending || s == Resuming || s == Reverting:
		return err.WithHint("wait until that is done, then try again")
	case e == AskSuspend && (s == Stopped || s == Failed):
		return err.WithHint("it has no memory to save: start it first")
	case e == AskResume && (s == Stopped || s == Failed):
		return err.WithHint("it has no saved memory: start it")
	}
	return err
}

// busy tells whether a VM in state s runs or is about to.
func (s State) busy() bool { return s.HasProcess() || s == Starting || s == Resuming }

// HasProcess tells whether a VM in state s should have a VMM process.
func (s State) HasProcess() bool { return s == Running || s == Paused || s == Suspending }
