package qemu

import (
	"path/filepath"

	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// LastExit tells how a machine ended that nobody watched, when its console says so. The console's log is a
// new one at each start.
func (d *Driver) LastExit(m vmm.Machine) (vmm.Exit, bool) {
	return machine.FromConsole(machine.Tail(filepath.Join(m.Dir, vmm.SerialLog), 500))
}
