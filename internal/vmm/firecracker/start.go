package firecracker

import (
	"context"
	"errors"
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
	listenTimeout = 20 * time.Second // until the API listens
	listenPoll    = time.Millisecond // between looks for its socket
	adoptTimeout  = 5 * time.Second
	lastWords     = time.Second // how long a process whose socket fails may take to end
)

// sockets are Firecracker's files that mean a running process. It removes none of them itself.
var sockets = []string{vmm.GuestSocket, APISocket}

// Start starts Firecracker, tells it what the machine is, and returns when it has started the guest.
func (d *Driver) Start(ctx context.Context, m vmm.Machine) (vmm.Running, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := d.Check(ctx, m); err != nil {
		return nil, err
	}
	return d.bringUp(ctx, m, "", func(ctx context.Context, c *client, v version) error {
		if err := configure(ctx, c, d.platform, v, d.seen(m, "").machine); err != nil {
			return err
		}
		return c.instanceStart(ctx)
	})
}

// bringUp starts Firecracker and makes it run the guest once its API answers. On error nothing is left behind.
// saved is the directory of the saved machine that it goes on from, or "".
func (d *Driver) bringUp(ctx context.Context, m vmm.Machine, saved string, begin func(context.Context, *client, version) error) (vmm.Running, error) {
	f, err := d.find(ctx)
	if err != nil {
		return nil, err
	}
	p, err := d.launch(f, m, saved)
	if err != nil {
		return nil, err
	}
	c := newClient(home(m.Dir))
	v, err := greet(ctx, c, home(m.Dir), p)
	if err == nil {
		err = begin(ctx, c, v)
	}
	if err == nil {
		return d.running(m, p, c), nil
	}
	err = d.explain(ctx, m, p, err)
	group := system.CgroupOf(p.PID(), groupName(m))
	machine.Kill(p)
	c.close()
	removeGroup(group)
	d.sweep(m.Dir)
	return nil, err
}

// launch starts the process, which holds the machine's lock from then on.
func (d *Driver) launch(f found, m vmm.Machine, saved string) (p *system.Process, err error) {
	lock, err := machine.Lock(m.Dir)
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	removeTraces(m.Dir)
	defer func() {
		if err != nil {
			removeTraces(m.Dir)
		}
	}()
	if err := prepareFiles(m); err != nil {
		return nil, err
	}
	o := system.StartOptions{
		Path: f.binary, Args: arguments(f.version), Dir: m.Dir, NewSession: true, Env: []string{},
		// The console goes to stdout, which is opened for appending as Firecracker's own files are not: so it can
		// be cut while it is written to.
		Log: filepath.Join(m.Dir, vmm.SerialLog), ErrorLog: filepath.Join(m.Dir, StderrLog),
	}
	if d.o.Jailer {
		inJail, err := jail(f, m, saved)
		if err != nil {
			return nil, err
		}
		// The jailer closes all other descriptors, and tells Firecracker its id.
		o.Path, o.Args, o.Stdin = f.jailer, append(inJail, o.Args...), lock
	} else {
		if idPattern.MatchString(string(m.ID)) {
			o.Args = append(o.Args, "--id", string(m.ID))
		}
		o.ExtraFiles, o.Confine = []*os.File{lock}, confinement(f.binary, m, saved)
	}
	if err := machine.WriteCommand(m.Dir, append([]string{o.Path}, o.Args...)); err != nil {
		return nil, err
	}
	if err := machine.WriteFacts(m, accelerator, layout(f.version, m)); err != nil {
		return nil, err
	}
	return d.startInGroup(m, o)
}

// arguments returns Firecracker's command line.
func arguments(v version) []string {
	args := []string{
		"--api-sock", APISocket, "--log-path", vmm.VMMLog, "--level", "Info", "--show-level", "--metrics-path", MetricsLog,
	}
	if v.pci() {
		args = append(args, "--enable-pci")
	}
	return args
}

// prepareFiles makes new logs, which Firecracker before 1.14 does not make itself, and the links to the drives, and
// the file for the memory, which comes there when it is saved.
func prepareFiles(m vmm.Machine) error {
	if err := machine.PrepareLog(m.Dir); err != nil {
		return err
	}
	if m.MemoryFile != "" {
		if err := os.WriteFile(machine.Absolute(m.Dir, m.MemoryFile), nil, 0o600); err != nil {
			return fault.Wrap(fault.Precondition, err, "cannot make the memory file of %s", m.Name)
		}
	}
	for _, name := range []string{vmm.VMMLog, MetricsLog} {
		path := filepath.Join(m.Dir, name)
		err := os.Rename(path, path+".1")
		if err == nil || os.IsNotExist(err) {
			err = os.WriteFile(path, nil, 0o600)
		}
		if err != nil {
			return fault.Wrap(fault.Precondition, err, "cannot make the logs of %s", m.Name)
		}
	}
	for _, disk := range m.Disks {
		if err := os.Symlink(machine.Absolute(m.Dir, disk.Path), filepath.Join(m.Dir, drivePath(disk.Role))); err != nil {
			return fault.Wrap(fault.Precondition, err, "cannot name the drives of %s", m.Name)
		}
	}
	return nil
}

// removeTraces removes what a dead machine left in dir, sockets, links and half a snapshot; the caller holds the
// lock. What cannot be removed shows at the next start, which needs the place.
func removeTraces(dir string) {
	machine.RemoveSockets(dir, sockets)
	_ = os.RemoveAll(filepath.Join(dir, newSnapshot))
	_ = os.RemoveAll(filepath.Join(dir, jailDir))
	links, err := filepath.Glob(filepath.Join(escapeGlob(dir), drivePath("*")))
	if err != nil {
		return
	}
	for _, link := range links {
		if info, err := os.Lstat(link); err == nil && info.Mode()&os.ModeSymlink != 0 {
			_ = os.Remove(link)
		}
	}
}

func escapeGlob(path string) string {
	return strings.NewReplacer(`\`, `\\`, "*", `\*`, "?", `\?`, "[", `\[`).Replace(path)
}

// sweep is removeTraces unless a process lives in dir.
func (d *Driver) sweep(dir string) {
	lock, err := machine.Lock(dir)
	if err != nil {
		return
	}
	defer lock.Close()
	removeTraces(dir)
}

// greet waits until the API answers, as long as the process lives, and returns its version, which is one this driver
// knows: the binary may be another one than it was when it was asked.
func greet(ctx context.Context, c *client, dir string, p *system.Process) (version, error) {
	if err := awaitListener(ctx, dir, p); err != nil {
		return version{}, err
	}
	v, err := c.version(ctx)
	if err != nil {
		return v, err
	}
	return v, v.check()
}

func awaitListener(ctx context.Context, dir string, p *system.Process) error {
	ctx, cancel := context.WithTimeout(ctx, listenTimeout)
	defer cancel()
	pause := time.NewTicker(listenPoll)
	defer pause.Stop()
	for {
		conn, err := system.DialUnixIn(ctx, dir, APISocket)
		if err == nil {
			return conn.Close()
		}
		select {
		case <-pause.C:
		case <-p.Done():
			return errEnded
		case <-ctx.Done():
			return fault.Wrap(fault.KindOf(ctx.Err()), err, "Firecracker's API does not listen")
		}
	}
}

var errEnded = errors.New("its process ended")

// explain makes the error of a failed start, with Firecracker's own last words when it has ended.
func (d *Driver) explain(ctx context.Context, m vmm.Machine, p *system.Process, err error) error {
	command := filepath.Join(m.Dir, vmm.CommandFile)
	died := ctx.Err() == nil && (errors.Is(err, errEnded) || !errors.As(err, new(*apiError)) && machine.Ended(p, lastWords))
	if !died {
		f := fault.Wrap(fault.KindOf(err), err, "Firecracker did not start %s", m.Name)
		if fault.HintOf(err) != "" {
			return f
		}
		return f.WithHint("the command line is in %s", command)
	}
	last := words(m.Dir)
	said := strings.Join(last, "; ")
	how := p.Status().String()
	if meaning := exitMeaning(p.Status()); meaning != "" {
		how += " (" + meaning + ")"
	}
	kind, hint := classify(strings.Join(slices.DeleteFunc(last, isRequest), "; "))
	if strings.Contains(said, "Failed to open the API socket") {
		kind, hint = fault.Conflict, "another process may use this VM's directory: see banger doctor"
	}
	if hint == "" {
		hint = "the command line is in " + command
	}
	return fault.New(kind, "Firecracker did not start %s: %s: %s", m.Name, how, said).WithHint("%s", hint)
}

// isRequest tells a line of the log that repeats a request, with words that would be taken for complaints.
func isRequest(line string) bool { return strings.Contains(line, "API server received") }

// words are the last ones that Firecracker said: in its log, or before it had one.
func words(dir string) []string {
	const lines = 3
	said := append(machine.Tail(filepath.Join(dir, vmm.VMMLog), lines), machine.Tail(filepath.Join(dir, StderrLog), lines)...)
	if len(said) == 0 {
		said = machine.Tail(filepath.Join(dir, vmm.SerialLog), lines)
	}
	return said
}

// Adopt takes hold of a Firecracker started earlier.
func (d *Driver) Adopt(ctx context.Context, m vmm.Machine, h vmm.Handle) (vmm.Running, error) {
	p, err := machine.Find(m.Dir, h)
	if fault.KindOf(err) == fault.NotFound {
		d.sweep(m.Dir)
	}
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, adoptTimeout)
	defer cancel()
	c := newClient(home(m.Dir))
	state, err := c.state(ctx)
	switch {
	case err != nil && machine.Ended(p, lastWords):
		_ = p.Close()
		d.sweep(m.Dir)
		return nil, fault.New(fault.NotFound, "Firecracker of %s has just ended", m.Name)
	case err != nil:
		// It is ours and it lives: whoever adopts it can still stop it, by signals.
		d.log.WarnContext(ctx, "adopted a Firecracker whose API does not answer", "machine", m.Name, "pid", p.PID(), "error", err)
	case state == stateNotStarted:
		machine.Kill(p)
		c.close()
		d.sweep(m.Dir)
		return nil, fault.New(fault.NotFound, "Firecracker of %s was cut off while it was started, and has been ended", m.Name)
	}
	return d.running(m, p, c), nil
}
