// Package vm holds what a VM is: its specification, its states and the names it may have. It is
// pure: no clock, no lock, no I/O.
package vm

import (
	"encoding/json"
	"net/netip"
	"time"
)

// ID names a VM for ever: eight lower-case hex digits, unique in one store. Host names that
// belong to a VM (its TAP device, its MAC) are derived from it.
type ID string

// Units says which systemd units of the image run.
type Units string

// The choices of Units.
const (
	UnitsFast  Units = "fast"  // units a micro-VM rarely needs are masked
	UnitsStock Units = "stock" // all that the image enables
)

// Spec is what the user wished, with all defaults filled in. Sizes are bytes.
type Spec struct {
	Name           string   `json:"name"`
	Image          string   `json:"image"`
	Kernel         string   `json:"kernel"`
	VMM            string   `json:"vmm"` // auto, firecracker, qemu or fake
	CPUs           int      `json:"cpus"`
	MemoryBytes    int64    `json:"memory_bytes"`
	DiskBytes      int64    `json:"disk_bytes"`
	WorkDiskBytes  int64    `json:"work_disk_bytes"`
	NAT            bool     `json:"nat"`
	Isolated       bool     `json:"isolated,omitempty"` // no sibling reaches it, nor it them
	Ports          []Port   `json:"ports,omitempty"`
	Units          Units    `json:"units"`
	AuthorizedKeys []string `json:"authorized_keys,omitempty"`
	Ephemeral      bool     `json:"ephemeral,omitempty"`
	Cold           bool     `json:"cold,omitempty"` // its create boots it, also when a template is there

	// Bounds in bytes a second; 0 is none. DiskRate is what each disk may read and write together, NetRate what the
	// network may carry in each direction.
	DiskRate int64 `json:"disk_rate,omitempty"`
	NetRate  int64 `json:"net_rate,omitempty"`
	Balloon  bool  `json:"balloon,omitempty"` // memory that the guest does not use goes back to the host
}

// VM is the persistent object: spec, identity and where it is in its life.
type VM struct {
	ID        ID
	Spec      Spec
	State     State
	Creating  bool   // the create that made it has not ended: it is erased when that fails
	Reason    string // why it is Failed
	IP        netip.Addr
	MAC       string
	CreatedAt time.Time
	StartedAt time.Time // zero while it does not run

	// The driver that runs it or ran it last, and what that driver needs to find the machine
	// again (a vmm.Handle as JSON; nil without a machine).
	Driver      string
	Handle      json.RawMessage
	Accelerator string
	SlowReason  string

	// Notes holds what each capability needs for its Down, by capability name.
	Notes map[string]json.RawMessage
}

// DNSName returns the name under which the VM is found in the zone vm.
func (v VM) DNSName() string { return v.Spec.Name + ".vm" }
