// Package snapshot keeps the snapshots of one VM: a directory for each, with the VM's disks, its memory
// when it had one, and a manifest. A snapshot appears whole or not at all and is never changed
// afterwards, only removed. Who makes them and goes back to them is the engine's.
package snapshot

import (
	"encoding/json"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"banger/internal/fault"
)

// Names inside a snapshot's directory, beside the disks, which have the names they have in the VM's.
const (
	ManifestFile = "snapshot.json" // written last
	MemoryDir    = "memory"        // what the driver saved; only of kind Memory
)

// Kind says what a snapshot holds.
type Kind string

// The kinds.
const (
	Disk   Kind = "disk"
	Memory Kind = "memory" // and disks, of the same moment
)

// Bounds on what a user may write into a snapshot.
const (
	maxNote      = 1000 // bytes
	maxLabels    = 64
	maxLabelKey  = 63
	maxLabelText = 255
	maxSnapshots = 256 // of one VM
)

// Manifest is the content of snapshot.json.
type Manifest struct {
	Tag       string            `json:"tag"`
	CreatedAt time.Time         `json:"created_at"`
	Note      string            `json:"note"`
	Labels    map[string]string `json:"labels"`
	Kind      Kind              `json:"kind"`
	State     string            `json:"state"` // of the VM
	Image     string            `json:"image"`
	Kernel    string            `json:"kernel"`

	// Only one and the same build of a driver goes on from memory it saved; empty without memory.
	Driver        string `json:"driver"`
	DriverVersion string `json:"driver_version"`
	DriverBuild   string `json:"driver_build"`

	// PausedFor is how long the guest stood still.
	PausedFor time.Duration `json:"paused_ns"`

	// Notes are those of the VM's capabilities: what its disks were made from.
	Notes map[string]json.RawMessage `json:"notes,omitempty"`

	// Files are all files but the manifest, by path below the directory, with their sizes.
	Files map[string]int64 `json:"files"`

	// MemoryCRC32C are disk.Sum of the files of the memory, by path; nil in snapshots of earlier versions.
	MemoryCRC32C map[string]uint32 `json:"memory_crc32c,omitempty"`
}

// Snapshot is a snapshot in its place.
type Snapshot struct {
	Manifest
	Dir           string // absolute
	ApparentBytes int64  // holes included
	RealBytes     int64  // what the files take; blocks shared with others count as their own
	Problem       string // why it cannot be gone back to; only List returns such snapshots
}

// CheckText refuses a note and labels that are too long or that would upset a terminal, as Usage faults.
func CheckText(note string, labels map[string]string) error {
	if !printable(note, maxNote, "\n\t") {
		return fault.New(fault.Usage, "a note is at most %d bytes of printable text", maxNote)
	}
	if len(labels) > maxLabels {
		return fault.New(fault.Usage, "a snapshot has at most %d labels, not %d", maxLabels, len(labels))
	}
	for k, v := range labels {
		if k == "" || !printable(k, maxLabelKey, "") || !printable(v, maxLabelText, "") {
			return fault.New(fault.Usage, "a label is a key of 1 to %d bytes and a text of at most %d, both printable", maxLabelKey, maxLabelText)
		}
	}
	return nil
}

func printable(s string, most int, also string) bool {
	if len(s) > most || !utf8.ValidString(s) {
		return false
	}
	for _, r := range s {
		if !unicode.IsPrint(r) && !strings.ContainsRune(also, r) {
			return false
		}
	}
	return true
}
