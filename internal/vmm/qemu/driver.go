// Package qemu is the driver for QEMU: with KVM where that runs guests at the speed of hardware,
// else in software. One process is one machine; it is asked by QMP and told by signals.
package qemu

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/kvm"
	"banger/internal/vmm/machine"
)

// Name is the driver's name.
const Name = "qemu"

// maxCPUs is what QEMU's machines take.
const maxCPUs = 255

// Options are a driver's. The zero value finds everything itself.
type Options struct {
	Binary string       // of QEMU; "" is looked up in PATH
	Log    *slog.Logger // nil: nothing is logged
}

// Driver runs machines on QEMU.
type Driver struct {
	o        Options
	log      *slog.Logger
	platform platform
	trim     machine.Trimmer

	mu     sync.Mutex
	probed *vmm.Caps
	binary string
	filter []string // arguments that confine QEMU, when it can be
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
	return &Driver{o: o, log: log, platform: platforms[runtime.GOARCH]}
}

// Name returns "qemu".
func (d *Driver) Name() string { return Name }

// Caps finds QEMU and measures KVM. Failures are not remembered: QEMU may be installed meanwhile.
func (d *Driver) Caps(ctx context.Context) (vmm.Caps, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.probed != nil {
		return *d.probed, nil
	}
	if d.platform.binary == "" {
		return vmm.Caps{}, fault.New(fault.Precondition, "no QEMU driver for %s", runtime.GOARCH)
	}
	binary := d.o.Binary
	if binary == "" {
		found, err := system.Find(d.platform.binary, d.platform.debianPackage)
		if err != nil {
			return vmm.Caps{}, err
		}
		binary = found
	}
	version, build, err := versionOf(ctx, binary)
	if err != nil {
		return vmm.Caps{}, err
	}
	caps := vmm.Caps{
		Accelerator: "kvm", Version: version, Build: build, KernelFormats: d.platform.kernelFormats,
		Channel: "virtio-serial", MaxCPUs: maxCPUs, Balloon: true,
	}
	if r := kvm.Probed(); !r.Usable {
		caps.Accelerator, caps.SlowReason = "tcg", r.Reason+"; software emulation is used"
	}
	filter, err := filterOf(ctx, binary)
	if err != nil {
		return vmm.Caps{}, err
	}
	d.platform = d.platform.emulatedBy(version)
	d.probed, d.binary, d.filter = &caps, binary, filter
	return caps, nil
}

// emulatedBy returns the platform as a version emulates it best in software.
func (p platform) emulatedBy(version string) platform {
	// With a thread for each CPU one may run code that another is patching, as Linux patches its own: guests
	// panic with "int3" now and then.
	if before(version, 8, 1) {
		p.softwareThreads = "single"
	}
	// Later ones translate code so that it runs at any address, and cmpxchg16b is right.
	if !before(version, 8, 0) {
		p.softwareKernelArgs = nil
	}
	return p
}

// before tells whether a version such as "7.2.22" is an earlier one; one that cannot be read is not.
func before(version string, major, minor int) bool {
	var a, b int
	n, _ := fmt.Sscanf(version, "%d.%d", &a, &b)
	return n == 2 && (a < major || a == major && b < minor)
}

// askTimeout bounds a question to the program, which has to be loaded for it: 20 MB with its libraries.
const askTimeout = 30 * time.Second

// versionPattern matches "QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)".
var versionPattern = regexp.MustCompile(`version (\d+\.\d+(?:\.\d+)?)(?: \((.*)\))?`)

func versionOf(ctx context.Context, binary string) (version, build string, err error) {
	out, err := system.Run(ctx, system.Command{Path: binary, Args: []string{"--version"}, Timeout: askTimeout})
	if ctx.Err() != nil {
		return "", "", ctx.Err()
	}
	if err != nil {
		return "", "", fault.Wrap(fault.Precondition, err, "QEMU does not run").WithHint(
			"see whether %s --version works", binary)
	}
	found := versionPattern.FindSubmatch(out)
	if found == nil {
		return "", "", fault.New(fault.Precondition, "%s does not say its version", binary)
	}
	version = string(found[1])
	return version, buildName(version, string(found[2])), nil
}

// buildName names a build in the same way whether the binary tells of it or a running QEMU does.
func buildName(version, distribution string) string {
	return strings.TrimSpace(version + " " + strings.Trim(distribution, " ()"))
}

// sandbox has QEMU give up, by a filter of system calls, what a guest that took it over would want: programs,
// other users' rights, priorities.
const sandbox = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

// filterOf returns the arguments for the sandbox, or none when this QEMU says that it was built without it. One that was not
// asked to the end has said nothing: its machines are not to run without.
func filterOf(ctx context.Context, binary string) ([]string, error) {
	filter := []string{"-sandbox", sandbox}
	_, err := system.Run(ctx, system.Command{Path: binary, Args: append(slices.Clone(filter), "-version"), Timeout: askTimeout})
	if exit := new(system.ExitError); errors.As(err, &exit) && exit.Signal == 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("ask QEMU for its sandbox: %w", err)
	}
	return filter, nil
}

// Check finds missing files and network devices, and what QEMU cannot be told.
func (d *Driver) Check(ctx context.Context, m vmm.Machine) error {
	if _, err := d.Caps(ctx); err != nil {
		return err
	}
	if err := checkBoot(m); err != nil {
		return err
	}
	return machine.CheckHost(m)
}

// sockets are QEMU's files that mean a running process.
var sockets = []string{vmm.GuestSocket, MonitorSocket}

// Adopt takes hold of a QEMU started earlier.
func (d *Driver) Adopt(ctx context.Context, m vmm.Machine, h vmm.Handle) (vmm.Running, error) {
	p, err := machine.Find(m.Dir, h)
	if fault.KindOf(err) == fault.NotFound {
		machine.RemoveIfUnlocked(m.Dir, sockets)
	}
	if err != nil {
		return nil, err
	}
	mon, err := connect(ctx, adoptTimeout, m.Dir, p)
	if err != nil {
		if machine.Ended(p, lastWords) {
			_ = p.Close()
			machine.RemoveIfUnlocked(m.Dir, sockets)
			return nil, fault.New(fault.NotFound, "QEMU of %s has just ended", m.Name)
		}
		// It is ours and it lives: whoever adopts it can still stop it, by signals.
		d.log.WarnContext(ctx, "adopted a QEMU whose monitor does not answer", "machine", m.Name, "pid", p.PID(), "error", err)
	}
	if mon != nil && halfRestored(ctx, mon) {
		mon.close()
		machine.Kill(p)
		machine.RemoveIfUnlocked(m.Dir, sockets)
		return nil, fault.New(fault.NotFound, "QEMU of %s was cut off while it was restored, and has been ended", m.Name)
	}
	return d.running(m, p, mon), nil
}

func (d *Driver) running(m vmm.Machine, p *system.Process, mon *monitor) vmm.Running {
	facts := machine.ReadFacts(m.Dir)
	untrim := d.trim.Watch(filepath.Join(m.Dir, vmm.SerialLog), filepath.Join(m.Dir, vmm.VMMLog))
	o := machine.Options{
		Dir: m.Dir, Process: p, Sockets: sockets,
		Dial: func(ctx context.Context) (net.Conn, error) {
			return system.DialUnixIn(ctx, m.Dir, vmm.GuestSocket)
		},
		Classify: func(s system.ExitStatus, stopped bool) vmm.Exit {
			return classify(m.Dir, facts.Accelerator == "tcg", mon, s, stopped)
		},
		Release: untrim,
	}
	if mon != nil {
		o.Ask = &machine.Step{Grace: 2 * time.Second, Do: func(ctx context.Context) error {
			return mon.callFor(ctx, "quit", nil)
		}}
		o.PowerButton = func(ctx context.Context) error { return mon.callFor(ctx, "system_powerdown", nil) }
		o.Release = func() { untrim(); mon.close() }
	}
	return &running{Machine: machine.New(o), name: m.Name, mon: mon, facts: facts}
}
