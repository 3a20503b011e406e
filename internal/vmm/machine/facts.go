package machine

import (
	"encoding/json"
	"os"
	"path/filepath"

	"banger/internal/fault"
	"banger/internal/vmm"
)

// FactsFile says what the machine in this directory was started as. A daemon that adopts it knows only what
// the VM shall be, and that may have changed since.
const FactsFile = "vmm.json"

// Facts are what must be known of a running machine to save it.
type Facts struct {
	Accelerator string      `json:"accelerator"`
	Layout      string      `json:"layout"` // as in Saved; empty: not known
	CPUs        int         `json:"cpus"`
	MemoryBytes int64       `json:"memory_bytes"`
	MemoryFile  string      `json:"memory_file,omitempty"` // absolute; what the guest writes goes there
	Disks       []SavedDisk `json:"disks"`                 // with their sizes at the start
	DiskRate    int64       `json:"disk_rate,omitempty"`   // as in vmm.Machine
	NetRate     int64       `json:"net_rate,omitempty"`
}

// WriteFacts writes down what m is about to be started as. The caller holds the machine's lock.
func WriteFacts(m vmm.Machine, accelerator, layout string) error {
	f := Facts{
		Accelerator: accelerator, Layout: layout, CPUs: m.CPUs, MemoryBytes: m.MemoryBytes, DiskRate: m.DiskRate, NetRate: m.NetRate,
	}
	if m.MemoryFile != "" {
		f.MemoryFile = Absolute(m.Dir, m.MemoryFile)
	}
	for _, d := range m.Disks {
		bytes, err := DiskBytes(m.Dir, d)
		if err != nil {
			return fault.Wrap(fault.Precondition, err, "the %s disk of %s cannot be used", d.Role, m.Name)
		}
		f.Disks = append(f.Disks, SavedDisk{Role: d.Role, Bytes: bytes, ReadOnly: d.ReadOnly})
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

// ReadFacts reads what the machine in dir was started as. Without them, as for a machine that an older banger
// started, it can do everything but be saved: see Saveable.
func ReadFacts(dir string) Facts {
	var f Facts
	text, err := os.ReadFile(filepath.Join(dir, FactsFile))
	if err != nil || json.Unmarshal(text, &f) != nil {
		return Facts{}
	}
	return f
}

// Saveable finds reasons why the machine called name cannot be saved into dir.
func (f Facts) Saveable(name, dir string) error {
	if f.Layout == "" {
		return fault.New(fault.Precondition, "the machine %s was started by an older banger and cannot be saved", name).
			WithHint("restart it once")
	}
	if f.MemoryFile != "" && !sameFile(f.MemoryFile, filepath.Join(dir, vmm.SavedMemory)) {
		return fault.New(fault.Usage, "the memory of %s is in %s, which is not in %s", name, f.MemoryFile, dir)
	}
	return nil
}

func sameFile(a, b string) bool {
	x, err := os.Stat(a)
	if err != nil {
		return false
	}
	y, err := os.Stat(b)
	return err == nil && os.SameFile(x, y)
}

// Saved begins the manifest of the machine.
func (f Facts) Saved() Saved {
	return Saved{
		Accelerator: f.Accelerator, Layout: f.Layout, CPUs: f.CPUs, MemoryBytes: f.MemoryBytes, Disks: f.Disks,
		DiskRate: f.DiskRate, NetRate: f.NetRate,
	}
}
