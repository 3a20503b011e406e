package qemu

import (
	"context"
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

// Bounds of a start.
const (
	startTimeout = 20 * time.Second     // until the monitor answers
	connectPause = 2 * time.Millisecond // between looks for the monitor's socket
	adoptTimeout = 5 * time.Second
)

// Start starts QEMU and returns when its monitor says that the machine runs.
func (d *Driver) Start(ctx context.Context, m vmm.Machine) (vmm.Running, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	caps, err := d.Caps(ctx)
	if err != nil {
		return nil, err
	}
	if err := d.Check(ctx, m); err != nil {
		return nil, err
	}
	args, err := arguments(d.platform, caps.Accelerator, m)
	if err != nil {
		return nil, err
	}
	return d.bringUp(ctx, m, caps.Accelerator, args, nil, func(context.Context, *monitor) error { return nil })
}

// bringUp starts QEMU and makes it ready once its monitor answers. On error nothing is left behind. The
// state, when there is one, becomes descriptor stateFD.
func (d *Driver) bringUp(ctx context.Context, m vmm.Machine, accelerator string, args []string, state *os.File,
	ready func(context.Context, *monitor) error,
) (vmm.Running, error) {
	p, err := d.launch(m, accelerator, append(slices.Clone(d.filter), args...), state)
	if err != nil {
		return nil, err
	}
	mon, err := connect(ctx, startTimeout, m.Dir, p)
	if err == nil {
		if err = ready(ctx, mon); err == nil {
			return d.running(m, p, mon), nil
		}
	}
	died := ctx.Err() == nil && machine.Ended(p, lastWords)
	machine.Kill(p)
	if mon != nil {
		mon.close()
	}
	machine.RemoveIfUnlocked(m.Dir, sockets)
	return nil, explain(m, err, died)
}

// launch starts the process, which holds the machine's lock from then on.
func (d *Driver) launch(m vmm.Machine, accelerator string, args []string, state *os.File) (*system.Process, error) {
	places, err := layout(d.platform, accelerator, m)
	if err != nil {
		return nil, err
	}
	lock, err := machine.Lock(m.Dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	machine.RemoveSockets(m.Dir, sockets)
	if err := machine.PrepareLogs(m.Dir, append([]string{d.binary}, args...)); err != nil {
		return nil, err
	}
	if err := machine.WriteFacts(m, accelerator, places); err != nil {
		return nil, err
	}
	files := []*os.File{lock}
	if state != nil {
		files = append(files, state)
	}
	return system.Start(system.StartOptions{
		Path: d.binary, Args: args, Dir: m.Dir, NewSession: true,
		Log: filepath.Join(m.Dir, vmm.VMMLog), ExtraFiles: files,
	})
}

// connect connects to the monitor, which may not listen yet, as long as the process lives and the
// time lasts.
func connect(ctx context.Context, most time.Duration, dir string, p *system.Process) (*monitor, error) {
	ctx, cancel := context.WithTimeout(ctx, most)
	defer cancel()
	pause := time.NewTicker(connectPause)
	defer pause.Stop()
	for {
		conn, err := system.DialUnixIn(ctx, dir, MonitorSocket)
		if err == nil {
			stop := context.AfterFunc(ctx, func() { conn.Close() })
			defer stop()
			return newMonitor(ctx, conn)
		}
		select {
		case <-pause.C:
		case <-p.Done():
			return nil, fault.New(fault.Unexpected, "QEMU ended: %s", p.Status())
		case <-ctx.Done():
			return nil, fault.Wrap(fault.KindOf(ctx.Err()), err, "QEMU's monitor does not listen")
		}
	}
}

// hints turns what QEMU says into what to do. The first match counts.
var hints = []struct {
	text string
	kind fault.Kind
	hint string
}{
	{"KVM kernel module", fault.Precondition, "KVM cannot be used: see banger doctor"},
	{"failed to initialize kvm", fault.Precondition, "KVM cannot be used: see banger doctor"},
	{"Device or resource busy", fault.Conflict, "another process uses the VM's network device: see banger doctor"},
	{"could not configure /dev/net/tun", fault.Precondition, "the VM's network device is missing or another user's: see banger doctor"},
	{"could not open /dev/net/tun", fault.Precondition, "your user may not open /dev/net/tun: see banger doctor"},
	{"\"write\" lock", fault.Conflict, "another process writes to this disk"},
	{"invalid kernel header", fault.Precondition, "the kernel is damaged: banger setup makes it again"},
	{"Permission denied", fault.Precondition, "your user cannot open a file of this VM: see its owner and mode"},
	{"No such file or directory", fault.Precondition, "a file of this VM is missing: see banger doctor"},
	{"load of migration failed", fault.Precondition, "what was saved does not fit or is damaged: it can only be booted anew"},
	{"annot allocate memory", fault.Precondition, "the host has too little free memory: give the VM less, or stop another one"},
	{"cannot set up guest memory", fault.Precondition, "the host has too little free memory: give the VM less, or stop another one"},
}

// explain makes the error of a failed start from QEMU's own last words.
func explain(m vmm.Machine, err error, died bool) error {
	const lines = 5
	said := strings.Join(machine.Tail(filepath.Join(m.Dir, vmm.VMMLog), lines), "; ")
	if !died || said == "" {
		return fault.Wrap(fault.KindOf(err), err, "QEMU did not start %s", m.Name).
			WithHint("the command line is in %s", filepath.Join(m.Dir, vmm.CommandFile))
	}
	return reason(m, said)
}

func reason(m vmm.Machine, said string) error {
	plain := fault.New(fault.Unexpected, "QEMU did not start %s: %s", m.Name, strings.ReplaceAll(said, "qemu-system-x86_64: ", ""))
	for _, h := range hints {
		if strings.Contains(said, h.text) {
			plain.Kind = h.kind
			return plain.WithHint("%s", h.hint)
		}
	}
	return plain.WithHint("the command line is in %s", filepath.Join(m.Dir, vmm.CommandFile))
}
