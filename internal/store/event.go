package store

import (
	"time"

	"banger/internal/vm"
)

// Event is one line of a VM's history.
type Event struct {
	ID        int64
	VM        vm.ID
	Name      string // of the VM, so that the history of a deleted one can be told
	At        time.Time
	Operation string // create, start, stop, restart, delete, reconcile or exit
	Stage     string
	Message   string // empty for a stage that went well
	Duration  time.Duration
}
