// Package fake is a driver whose machines are ordinary processes that answer as a guest's agent
// would. They outlive the daemon and are adopted like real ones, and start in milliseconds: tests
// of everything above the drivers use it, and it passes the conformance suite so that they may.
package fake

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// Name is the driver's name.
const Name = "fake"

// Argument is the first argument of the process that is a machine; the rest is for Main.
const Argument = "fake-vmm"

// startTimeout bounds the start of the process, until it listens.
const startTimeout = 10 * time.Second

// exitFile is where the process says how its guest ended.
const exitFile = "fake-exit.json"

// Driver runs machines as processes of one program.
type Driver struct {
	command []string
}

var (
	_ vmm.Driver   = (*Driver)(nil)
	_ vmm.Restorer = (*Driver)(nil)
)

// leftovers are the files that mean a running process.
var leftovers = []string{vmm.GuestSocket, controlSocket, exitFile}

// Of Caps.
const (
	accelerator = "fake"
	build       = "1"
)

// New returns a driver that starts command, with Argument and more arguments added; the program
// passes what follows Argument to Main. Without a command it is our own executable.
func New(command ...string) (*Driver, error) {
	if len(command) == 0 {
		self, err := os.Executable()
		if err != nil {
			return nil, fault.Wrap(fault.Precondition, err, "cannot find our own executable")
		}
		command = []string{self}
	}
	return &Driver{command: command}, nil
}

// Name returns "fake".
func (d *Driver) Name() string { return Name }

// Caps needs nothing of the host.
func (d *Driver) Caps(context.Context) (vmm.Caps, error) {
	return vmm.Caps{
		Accelerator: accelerator, Version: build, Build: build, SlowReason: "no virtual machine at all: the fake driver is for tests",
		KernelFormats: []string{"elf", "bzimage", "image"}, Channel: "virtio-serial", MaxCPUs: 64,
		Balloon: true,
	}, nil
}

// Check finds missing files.
func (d *Driver) Check(_ context.Context, m vmm.Machine) error { return machine.CheckFiles(m) }

// Start starts the process and returns when it listens on the guest channel.
func (d *Driver) Start(ctx context.Context, m vmm.Machine) (vmm.Running, error) {
	if err := d.Check(ctx, m); err != nil {
		return nil, err
	}
	args := slices.Clone(m.Cmdline)
	if m.MemoryFile != "" {
		args = append(args, argMemoryFile+machine.Absolute(m.Dir, m.MemoryFile))
	}
	return d.start(ctx, m, args)
}

// start starts the process with the arguments of its guest.
func (d *Driver) start(ctx context.Context, m vmm.Machine, args []string) (*running, error) {
	lock, err := machine.Lock(m.Dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	machine.RemoveSockets(m.Dir, leftovers)
	argv := append(append([]string{}, d.command...), Argument, m.Name)
	argv = append(argv, args...)
	if err := machine.WriteFacts(m, accelerator, layout(m)); err != nil {
		return nil, err
	}
	if err := machine.WriteCommand(m.Dir, argv); err != nil {
		return nil, err
	}
	ready, says, err := os.Pipe()
	if err != nil {
		return nil, err
	}
	defer ready.Close()
	p, err := system.Start(system.StartOptions{
		Path: argv[0], Args: argv[1:], Dir: m.Dir, NewSession: true,
		Log: filepath.Join(m.Dir, vmm.VMMLog), ExtraFiles: []*os.File{lock, says},
	})
	says.Close()
	if err != nil {
		return nil, err
	}
	if err := waitReady(ctx, ready); err != nil {
		machine.Kill(p)
		machine.RemoveSockets(m.Dir, leftovers) // the lock is still ours
		return nil, fault.Wrap(fault.KindOf(err), err, "the fake machine %s did not start: %s",
			m.Name, strings.Join(machine.Tail(filepath.Join(m.Dir, vmm.VMMLog), 3), "; "))
	}
	return newRunning(m, p), nil
}

// waitReady waits for the byte that the process writes when it listens.
func waitReady(ctx context.Context, ready *os.File) error {
	deadline := time.Now().Add(startTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(deadline) {
		deadline = d
	}
	if err := ready.SetReadDeadline(deadline); err != nil {
		return err
	}
	defer context.AfterFunc(ctx, func() { _ = ready.SetReadDeadline(time.Unix(1, 0)) })()
	_, err := ready.Read(make([]byte, 1))
	switch {
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.Is(err, os.ErrDeadlineExceeded):
		return fault.New(fault.Timeout, "it does not listen after %s", startTimeout)
	case errors.Is(err, io.EOF):
		return fault.New(fault.Unexpected, "its process ended")
	}
	return err
}

// Adopt takes hold of a process started earlier.
func (d *Driver) Adopt(_ context.Context, m vmm.Machine, h vmm.Handle) (vmm.Running, error) {
	p, err := machine.Find(m.Dir, h)
	if fault.KindOf(err) == fault.NotFound {
		machine.RemoveIfUnlocked(m.Dir, leftovers)
	}
	if err != nil {
		return nil, err
	}
	return newRunning(m, p), nil
}

func newRunning(m vmm.Machine, p *system.Process) *running {
	r := machine.New(machine.Options{
		Dir: m.Dir, Process: p, Sockets: leftovers,
		Dial: func(ctx context.Context) (net.Conn, error) {
			return system.DialUnixIn(ctx, m.Dir, vmm.GuestSocket)
		},
		Classify: func(s system.ExitStatus, stopped bool) vmm.Exit { return classify(m.Dir, s, stopped) },
		PowerButton: func(context.Context) error {
			return p.Signal(powerButton)
		},
	})
	return &running{Machine: r, name: m.Name, dir: m.Dir, facts: machine.ReadFacts(m.Dir)}
}

// classify believes the guest's own word first.
func classify(dir string, s system.ExitStatus, stopped bool) vmm.Exit {
	var said vmm.Exit
	text, err := os.ReadFile(filepath.Join(dir, exitFile))
	if err == nil && json.Unmarshal(text, &said) == nil && said.Kind != "" {
		return said
	}
	return machine.ClassifyStatus(s, stopped)
}
