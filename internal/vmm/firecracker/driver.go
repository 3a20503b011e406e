// Package firecracker is the driver for Firecracker. One process is one machine and lives one life: it is configured
// over its API, started, and ends with its guest. It works in the machine's directory and is given relative names, so
// that what is in saved state means each machine's own files.
package firecracker

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/kvm"
	"banger/internal/vmm/machine"
)

// Name is the driver's name.
const Name = "firecracker"

// accelerator is the only one.
const accelerator = "kvm"

// Files of a machine beside those of package vmm.
const (
	MetricsLog = "metrics.log" // one JSON object a line, every minute
	StderrLog  = "vmm.err"     // what Firecracker says before, and after, it has its log
)

// Options are a driver's. The zero value finds everything itself.
type Options struct {
	Binary string            // of Firecracker; "" is looked up in PATH
	KVM    func() kvm.Result // how fast KVM is; nil: it is measured
	Log    *slog.Logger      // nil: nothing is logged
	Jailer bool              // upstream's jailer starts it, which needs root, in place of our own confinement
}

// Driver runs machines on Firecracker.
type Driver struct {
	o        Options
	log      *slog.Logger
	platform platform
	trim     machine.Trimmer

	mu     sync.Mutex
	probed *found
}

// found is what was found on the host.
type found struct {
	caps    vmm.Caps
	version version
	binary  string
	jailer  string // "" is none
}

var (
	_ vmm.Driver   = (*Driver)(nil)
	_ vmm.Restorer = (*Driver)(nil)
)

// New returns the driver for this host's architecture. It looks at nothing yet.
func New(o Options) *Driver {
	log := o.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	if o.KVM == nil {
		o.KVM = kvm.Probed
	}
	return &Driver{o: o, log: log, platform: platforms[runtime.GOARCH]}
}

// Name returns "firecracker".
func (d *Driver) Name() string { return Name }

// Caps finds Firecracker and measures KVM. Failures are not remembered: it may be installed meanwhile.
func (d *Driver) Caps(ctx context.Context) (vmm.Caps, error) {
	f, err := d.find(ctx)
	return f.caps, err
}

func (d *Driver) find(ctx context.Context) (found, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.probed != nil {
		return *d.probed, nil
	}
	if d.platform.kernelArgs == nil {
		return found{}, fault.New(fault.Precondition, "there is no Firecracker for %s", runtime.GOARCH)
	}
	binary, err := d.binary()
	if err != nil {
		return found{}, err
	}
	if r := d.o.KVM(); !r.Usable {
		return found{}, fault.New(fault.Precondition, "Firecracker needs KVM, and %s", r.Reason).
			WithHint("use QEMU, which runs VMs without KVM too: --vmm qemu")
	}
	v, err := versionOf(ctx, binary)
	if err != nil {
		return found{}, err
	}
	if err := v.check(); err != nil {
		return found{}, err
	}
	f := found{version: v, binary: binary, caps: vmm.Caps{
		Accelerator: accelerator, Version: v.String(), Build: v.String(), KernelFormats: kernelFormats(v),
		Channel: "vsock", MaxCPUs: maxCPUs, Warning: v.warning(),
		NetRate: true, Balloon: v.reportsFree(),
	}}
	if d.o.Jailer {
		if f.jailer, err = d.checkJailer(binary); err != nil {
			return found{}, err
		}
	}
	if f.caps.Warning != "" {
		d.log.WarnContext(ctx, f.caps.Warning)
	}
	if !system.Confines() {
		d.log.InfoContext(ctx, "this kernel has no Landlock: Firecracker's access to files is not confined")
	}
	d.probed = &f
	return f, nil
}

// binary returns the absolute path of Firecracker.
func (d *Driver) binary() (string, error) {
	if d.o.Binary != "" {
		path, err := filepath.Abs(d.o.Binary)
		if err != nil {
			return "", fault.Wrap(fault.Precondition, err, "cannot find Firecracker")
		}
		return path, nil
	}
	path, err := system.Find("firecracker", "")
	if err != nil {
		return "", fault.New(fault.Precondition, "the program firecracker is not installed").
			WithHint("see docs/firecracker.md for where to get it")
	}
	return path, nil
}

// kernelFormats are those a version boots, the best first: an ELF kernel need not be unpacked.
func kernelFormats(v version) []string {
	switch {
	case runtime.GOARCH == "arm64":
		return []string{"image"}
	case v.bzImage():
		return []string{"elf", "bzimage"}
	}
	return []string{"elf"}
}

// versionOf asks a binary. Its first line is the answer; a line of its log may follow.
func versionOf(ctx context.Context, binary string) (version, error) {
	out, err := system.Run(ctx, system.Command{Path: binary, Args: []string{"--version"}, Timeout: 10 * time.Second})
	switch {
	case ctx.Err() != nil:
		return version{}, ctx.Err()
	case errors.Is(err, syscall.ENOEXEC):
		return version{}, fault.Wrap(fault.Precondition, err, "%s is no program for this host", binary).
			WithHint("install the Firecracker for %s: see docs/firecracker.md", runtime.GOARCH)
	case err != nil:
		return version{}, fault.Wrap(fault.Precondition, err, "Firecracker does not run").
			WithHint("see whether %s --version works", binary)
	}
	first, _, _ := bytes.Cut(out, []byte("\n"))
	text, ok := strings.CutPrefix(strings.TrimSpace(string(first)), "Firecracker ")
	if !ok {
		return version{}, fault.New(fault.Precondition, "%s is no Firecracker: it says %q", binary, oneLine(first)).
			WithHint("set the right one in config.toml, section [firecracker]: see docs/firecracker.md")
	}
	return parseVersion(text)
}

// Check finds missing files and network devices, and what Firecracker cannot be told.
func (d *Driver) Check(ctx context.Context, m vmm.Machine) error {
	f, err := d.find(ctx)
	if err != nil {
		return err
	}
	if err := checkMachine(f.version, m); err != nil {
		return err
	}
	return checkBoot(d.platform, f.version, m)
}
