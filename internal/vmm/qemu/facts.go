package qemu

import (
	"encoding/json"
	"os"
	"path/filepath"

	"banger/internal/fault"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// FactsFile says what the machine in this directory was started as. A daemon that adopts it knows only what
// the VM shall be, and that may have changed since.
const FactsFile = "vmm.json"

// facts are what Save must know of a running machine.
type facts struct {
	Accelerator string      `json:"accelerator"`
	Layout      string      `json:"layout"` // see layout; empty: not known
	CPUs        int         `json:"cpus"`
	MemoryBytes int64       `json:"memory_bytes"`
	MemoryFile  string      `json:"memory_file,omitempty"` // absolute; what the guest writes goes there
	Disks       []factsDisk `json:"disks"`
}

type factsDisk struct {
	Role     string `json:"role"`
	ReadOnly bool   `json:"read_only"`
}

// writeFacts writes down what m is about to be started as. The caller holds the machine's lock.
func writeFacts(p platform, accelerator string, m vmm.Machine) error {
	f := facts{Accelerator: accelerator, CPUs: m.CPUs, MemoryBytes: m.MemoryBytes}
	if m.MemoryFile != "" {
		f.MemoryFile = machine.Absolute(m.Dir, m.MemoryFile)
	}
	for _, d := range m.Disks {
		f.Disks = append(f.Disks, factsDisk{Role: d.Role, ReadOnly: d.ReadOnly})
	}
	var err error
	if f.Layout, err = layout(p, accelerator, m); err != nil {
		return err
	}
	text, err := json.Marshal(f)
	if err != nil {
		return err
	}
	// No need to survive a crash of the host: the process does not either.
	if err := os.WriteFile(filepath.Join(m.Dir, FactsFile), append(text, '\n'), 0o600); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write down what %s is", m.Name)
	}
	return nil
}

// readFacts reads what the machine in dir was started as. Without them, as for a machine that an older banger
// started, it can do everything but be saved, which says so.
func readFacts(dir string) facts {
	var f facts
	text, err := os.ReadFile(filepath.Join(dir, FactsFile))
	if err != nil || json.Unmarshal(text, &f) != nil {
		return facts{}
	}
	return f
}
