// Package adopt is what the agent does around a saved memory: it makes the guest ready to be saved, and makes
// a guest that was restored what the host says it is.
package adopt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/identity"
)

// Guest is the running guest. It does one thing at a time.
type Guest struct {
	// Dir is the agent's own directory, below /run.
	Dir string
	// Disks are the directories on which the VM's writable disks may be mounted.
	Disks []string
	// Systemd tells whether the first process is systemd.
	Systemd func() bool
	// Ready returns once the guest is far enough for programs to be held; nil: it always is.
	Ready func(context.Context) error
	// Freeze lets all programs stand still until thaw, and notes each group of them before; see cgroup.Freeze.
	Freeze func(ctx context.Context, note func(group string) error) (thaw func() error, err error)
	// Thaw lets groups that were noted run on; see cgroup.Thaw.
	Thaw func(groups []string) error
	// Machine tells this machine from others that are restored from its memory; see Serials.
	Machine func() string
	// StartGuard starts a process that calls Guard should this one die before end; nil: there is none.
	StartGuard func(context.Context) (end func(), err error)

	turn     sync.Mutex
	starting sync.RWMutex // locked while programs stand still
	// held is set while programs stand still: in the memory of a guest that was saved, and so in each of its clones.
	held *held
	// late tells that programs that were held ran on although nobody had said as whom.
	late bool
	// was is the machine id of before an Adopt that has not come to its end: one that is asked for again finds the new one.
	was *string
	// syncing is a sync that a dead disk holds up; there is at most one.
	syncing chan struct{}
}

// held is a guest whose programs stand still.
type held struct {
	thaw    func() error // nil: they could not be stopped
	disks   []*os.File   // on file systems that stand still
	end     func()       // of the guard
	since   time.Time
	machine string   // Machine when it began
	lacking []string // what could not be had, sentences about the guest

	template bool              // nobody has used it
	network  *identity.Network // of a template: silent
}

var errBusy = errors.New("the guest is being saved or restored already")

// timesFile holds, below Dir, how long each step of the last Adopt took.
const timesFile = "adopt.times"

// Adopt makes a restored guest what the request says, and returns when all of it holds. The host has set the clock. A
// host whose stream broke asks again, and waits for what its first request began.
func (g *Guest) Adopt(ctx context.Context, r *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error) {
	if err := lock(ctx, g.turn.TryLock); err != nil {
		return nil, fmt.Errorf("%w: %w", errBusy, err)
	}
	defer g.turn.Unlock()
	if err := g.adopt(ctx, r); err != nil {
		return nil, err
	}
	late := g.late && r.GetIdentity() != nil
	g.late = false
	return &agentv1.AdoptResponse{Late: late}, nil
}

func (g *Guest) adopt(ctx context.Context, r *agentv1.AdoptRequest) error {
	t := &times{begin: time.Now()}
	err := t.run("thaw disks", g.held.thawDisks)
	if err == nil {
		err = t.run("entropy", func() error { return addEntropy(r.GetEntropy()) })
	}
	if err != nil {
		return err
	}
	if r.GetGrowDisks() { // while nobody writes: a file system that grows takes no writes
		if err := t.run("grow", func() error { return growAll(g.Disks) }); err != nil {
			return err
		}
	}
	if id := r.GetIdentity(); id != nil {
		err = g.become(ctx, t, id)
	} else {
		err = errors.Join(t.run("announce", identity.Announce), t.run("thaw", g.release))
	}
	if err != nil {
		return err
	}
	t.add("all", t.begin)
	// For whoever looks for what is slow; that /run is full is no reason to fail.
	_ = os.WriteFile(filepath.Join(g.Dir, timesFile), []byte(t.String()), 0o644)
	return nil
}

// become makes the guest another VM. Until the last step nobody reaches it over the network. One step follows the
// other: they have one processor's work to do, and wait for nobody but sshd.
func (g *Guest) become(ctx context.Context, t *times, id *agentv1.GuestConfig) error {
	if g.was == nil {
		old, err := machineID()
		if err != nil {
			return err
		}
		g.was = &old
	}
	var network *identity.Network
	var sshd *restart
	fromTemplate := g.held != nil && g.held.template
	if fromTemplate {
		network = g.held.network
	}
	for _, step := range []struct {
		name  string
		inUse bool // a template has nothing of the kind
		f     func() error
	}{
		{"silence", true, func() (err error) { network, err = identity.Silence(); return err }},
		{"keys", false, func() error { return identity.WriteKeys("/", id) }},
		{"restart sshd", true, func() (err error) { sshd, err = restartSSHD(); return err }},
		{"hang up", true, hangUp},
		{"names", false, func() error { return rename(id) }},
		{"boot id", false, func() error { return newBootID(g.Dir) }},
		{"seeds", true, forgetSeeds},
		{"addresses", false, func() error { return network.Prepare(id.GetInterfaces()) }},
		{"await sshd", true, func() error {
			if g.held != nil { // the signal is the first thing it will know of
				return nil
			}
			return sshd.wait(ctx)
		}},
		{"raise", false, func() error { return network.Raise() }},
		{"thaw", false, g.release},
		{"renew journal", true, func() error { return g.renewJournal(ctx, *g.was, id.GetMachineId()) }},
		{"journal", false, func() error {
			return tellJournal("This machine was restored from memory and is now " + id.GetHostname())
		}},
	} {
		if step.inUse && fromTemplate {
			continue
		}
		if err := t.run(step.name, step.f); err != nil {
			return err
		}
	}
	g.was = nil
	return nil
}

// hangUp ends the connections of the machine that this one was made of. What the kernel cannot end stays until it
// times out: its address is gone.
func hangUp() error {
	if err := identity.HangUp(); err != nil {
		return tellJournal("connections of the machine this one was made of are left: " + err.Error())
	}
	return nil
}

// rename writes the machine's names.
func rename(id *agentv1.GuestConfig) error {
	if err := unix.Sethostname([]byte(id.GetHostname())); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	return identity.WriteNames("/", id)
}

func machineID() (string, error) {
	b, err := os.ReadFile("/etc/machine-id")
	if err != nil && !errors.Is(err, os.ErrNotExist) { // a small image may have none
		return "", err
	}
	return strings.TrimSpace(string(b)), nil
}

// times are the durations of the steps.
type times struct {
	begin time.Time
	text  strings.Builder
}

func (t *times) run(name string, f func() error) error {
	begin := time.Now()
	err := f()
	t.add(name, begin)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}

func (t *times) add(name string, begin time.Time) {
	fmt.Fprintf(&t.text, "%s %.1f ms\n", name, float64(time.Since(begin).Microseconds())/1000)
}

// String lists the steps in the order of their ends.
func (t *times) String() string { return t.text.String() }
