// Package vmm is the vocabulary between the engine and the drivers that run machines: Driver,
// Running and the machine they run. Drivers live in sub-packages; vmmtest is the conformance
// suite all of them pass, the fake included.
package vmm

import (
	"context"
	"encoding/json"
	"net"

	"banger/internal/vm"
)

// File names inside a machine's directory. A VMM has that directory as its working directory and
// is given relative names, so that paths stay short and a snapshot's paths mean each clone's own files.
const (
	GuestSocket = "guest.sock"  // the guest channel
	SerialLog   = "serial.log"  // the guest's console
	VMMLog      = "vmm.log"     // stdout and stderr of the VMM
	CommandFile = "command.txt" // the command line, to run it again by hand
)

// ChannelPort is the name of the virtio-serial port that carries the guest channel.
const ChannelPort = "banger.agent.0"

// VsockPort is where the agent listens on a VMM that has vsock; below 1024 is for the privileged. Each connection is
// one stream, which is to say that nothing of package channel is spoken there.
const VsockPort = 1024

// Disk is one drive. Order matters: the first one is /dev/vda in the guest.
type Disk struct {
	Role     string // root, overlay, work or modules; unique in a machine
	Path     string // absolute, or relative to Machine.Dir
	ReadOnly bool
}

// NIC is one network interface on an existing TAP device.
type NIC struct {
	TAP string
	MAC string
}

// Machine is all a driver needs to run a VM. Capabilities fill it in.
type Machine struct {
	ID          vm.ID
	Name        string
	Dir         string // absolute; the machine's own directory, which exists
	CPUs        int
	MemoryBytes int64
	Kernel      string   // absolute path of a kernel the driver's Caps().KernelFormats names
	Initramfs   string   // absolute or relative to Dir
	Cmdline     []string // kernel arguments; the driver appends those of its own machine
	Disks       []Disk
	NICs        []NIC

	DiskRate int64 // bytes a second that each disk may read and write together; 0 is no limit
	NetRate  int64 // bytes a second that each interface may carry in each direction; 0 is no limit
	Balloon  bool  // the guest reports the memory that it does not use, which the host then takes back

	// MemoryFile, when set, is the file that the machine's memory lives in, shared: a machine that is saved to
	// become a template. Absolute, or relative to Dir.
	MemoryFile string
}

// Handle finds a machine again after the daemon restarted. It is stored in the VM's row.
type Handle struct {
	PID       int             `json:"pid"`
	StartTime uint64          `json:"start_time"` // field 22 of /proc/<pid>/stat: clock ticks since boot
	Extra     json.RawMessage `json:"extra,omitempty"`
}

// Caps is what a driver can do on this host.
type Caps struct {
	Accelerator   string   // kvm, tcg or fake
	Version       string   // of the VMM binary
	Build         string   // its exact version, with the distributor's: no other one restores what it saved
	SlowReason    string   // why Accelerator is not kvm; empty when it is
	KernelFormats []string // in order of preference: "elf", "bzimage", "image" (arm64)
	Channel       string   // "virtio-serial" or "vsock"
	Warning       string   // what is known to be wrong with this version of the VMM; empty when nothing is
	MaxCPUs       int
	NetRate       bool // it keeps Machine.NetRate
	Balloon       bool // it has Machine.Balloon
}

// ExitKind classes the end of a machine.
type ExitKind string

// The ways a machine ends.
const (
	ExitPowerOff ExitKind = "power-off" // the guest powered itself off
	ExitReboot   ExitKind = "reboot"    // the guest asked for a reboot; VMMs here never reset in place
	ExitPanic    ExitKind = "panic"     // the guest's kernel panicked
	ExitStopped  ExitKind = "stopped"   // Stop of this Running did it
	ExitKilled   ExitKind = "killed"    // a signal from outside
	ExitCrash    ExitKind = "crash"     // the VMM failed
)

// Exit tells how a machine ended.
type Exit struct {
	Kind   ExitKind
	Detail string // one line: signal, exit code, the line of the panic
	// Emulation says of a panic that the emulated processor is to blame, and not the guest: the same boot may well
	// succeed the next time.
	Emulation bool
}

// Driver runs machines on one VMM. Machines outlive the daemon; Adopt finds one again. All
// methods may be called from several goroutines.
type Driver interface {
	// Name is the driver's name in specs and rows.
	Name() string
	// Caps tells what the driver can do here. It may probe the host once and remembers the answer;
	// a Precondition fault says why the driver cannot be used.
	Caps(context.Context) (Caps, error)
	// Check finds what would make Start fail, and changes nothing.
	Check(context.Context, Machine) error
	// Start starts the machine's process and returns when the VMM has taken it; the guest may
	// not have booted. On error nothing is left behind. A machine that has a process is a Conflict.
	Start(context.Context, Machine) (Running, error)
	// Adopt finds a machine that an earlier daemon started. A NotFound fault says that the process
	// is gone; what it left (sockets) is removed then. A zero handle, of a start that was not recorded,
	// finds the process that holds the machine's directory, if there is one.
	Adopt(context.Context, Machine, Handle) (Running, error)
}

// Speaker is a Running whose guest can be asked by words, see channel.Host.Say: quicker than by a stream, where the guest
// was just restored.
type Speaker interface {
	// SayGuest says a word. channel.ErrMute says that the guest has to be asked otherwise.
	SayGuest(ctx context.Context, kind byte, question []byte) (code byte, answer []byte, err error)
}

// Running is a machine with a process.
type Running interface {
	Handle() Handle
	// DialGuest returns a new stream to the agent. It waits for the guest until ctx ends or the machine
	// does, which is a Conflict fault.
	DialGuest(context.Context) (net.Conn, error)
	// Done is closed when the process has ended.
	Done() <-chan struct{}
	// Exit tells how; it is valid once Done is closed.
	Exit() Exit
	// PowerButton asks the guest's firmware interface for an orderly power-off; Unsupported
	// machines answer with a Precondition fault. It does not wait.
	PowerButton(context.Context) error
	// Stop ends the process, insisting up to SIGKILL, waits for its end, and removes its sockets. It succeeds when
	// the machine has already ended. When ctx ends first it kills at once: what it began it finishes.
	Stop(context.Context) error
	// Close lets go of the machine without touching it: connections closed, goroutines ended. Done then stays as it is.
	Close() error
}

// Pauser is a Running that can halt its guest. Both calls succeed when it already is so.
type Pauser interface {
	Pause(context.Context) error
	Resume(context.Context) error
}

// Files of a saved machine, below a directory of its own.
const (
	SavedManifest = "machine.json" // the driver's: version, layout, sizes; written last
	SavedState    = "state"        // devices, and the memory unless there is a memory file
	SavedMemory   = "memory"       // the memory of a machine with a MemoryFile of that name in that directory
)

// Saver is a Running whose memory and devices can be written to files.
type Saver interface {
	// Save writes a paused machine's state into dir, which exists; one that runs, or that was saved and not
	// resumed since, is a Conflict. The machine stays paused and can be resumed. With Machine.MemoryFile set
	// the memory is in that file already, which is dir's SavedMemory, and only the devices are written; as soon
	// as the machine is resumed, the file changes and what was saved is void. On error (a full disk is a
	// Precondition fault) what was written is removed.
	Save(ctx context.Context, dir string) error
}

// Writer is a Saver that lets its guest go on early: when Write returns, a machine without a MemoryFile may be resumed;
// what was written is whole when seal has returned, which flushes and sums it up. On error what was written is removed.
type Writer interface {
	Write(ctx context.Context, dir string) (seal func(context.Context) error, err error)
}

// Restorer is a Driver that starts machines from what a Saver wrote.
type Restorer interface {
	// CheckSaved finds what would keep the state in dir from being restored as m: another VMM version, another
	// layout, missing or damaged files. It answers with a Precondition fault and changes nothing.
	CheckSaved(ctx context.Context, m Machine, dir string) error
	// Restore is Start from saved state; the guest runs when it returns. A state with a memory file is mapped
	// privately: the files stay as they are, many machines share them, and they must not change while one
	// lives. Only ID, TAP devices, MACs, rates and the paths of disks of m may differ from the saved machine. A writable
	// disk that a guest asks for its serial number answers as m's: by that a copy knows that it is one. Writable
	// disks may have grown, which the guest is told as for a disk that grows while it runs. Kernel, Initramfs and
	// Cmdline are not looked at: they are in the memory. The network device still has the saved machine's MAC,
	// and has announced nothing: the guest sets its own (virtio-net's CTRL_MAC_ADDR, that is, RTM_SETLINK with
	// IFLA_ADDRESS) and announces it. On error nothing is left behind.
	Restore(ctx context.Context, m Machine, dir string) (Running, error)
}
