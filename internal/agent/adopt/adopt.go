// Package adopt is what the agent does around a saved memory: it makes the guest ready to be saved, and makes
// a guest that was restored what the host says it is.
package adopt

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

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
	// Freeze lets all programs but the guard stand still until thaw, and notes each group of them before; see cgroup.Freeze.
	// What thaw could not let go it tries again when it is called again.
	Freeze func(ctx context.Context, guard int, note func(group string) error) (thaw func() error, err error)
	// Thaw lets groups that were noted run on; see cgroup.Thaw.
	Thaw func(groups []string) error
	// Machine tells this machine from others that are restored from its memory; see Serials.
	Machine func() string
	// StartGuard starts a process that sees to it that there is another agent should this one die before end, for as long
	// as Holds; nil: there is none.
	StartGuard func(context.Context) (pid int, end func(), err error)
	// Later does something once the caller whose context it is has its answer, and does not wait for it; nil: at once.
	Later func(context.Context, func())

	turn     sync.Mutex
	starting sync.RWMutex // locked while programs stand still
	// held is set while programs stand still: in the memory of a guest that was saved, and so in each of its clones.
	held *held
	// late tells that programs that were held ran on although nobody had said as whom.
	late bool
	// was is the machine id of before an Adopt that has not come to its end: one that is asked for again finds the new one.
	was *string
	// became is what the last Adopt made of the guest; nil: it was made nothing else.
	became  *agentv1.GuestConfig
	restMu  sync.Mutex
	resting *rest // of the last clone; nil: there was none

	sshdMu sync.Mutex
	sshd   *restart // of an sshd that was told to read its keys again, as long as it may not have
	// syncing is a sync that a dead disk holds up; there is at most one.
	syncing chan struct{}
}

// held is a guest whose programs stand still.
type held struct {
	thaw    func() error  // nil: they could not be stopped
	disks   []*frozenDisk // on file systems that stand still
	guard   int           // a process; 0: there is none
	end     func()        // of the guard
	since   time.Time
	machine string   // Machine when it began
	lacking []string // what could not be had, sentences about the guest

	template bool              // nobody has used it
	network  *identity.Network // of a template: silent; nil: not yet
	told     bool              // a template's clone knows who it is: its programs rest

	runs  bool // programs do again
	tries int  // to let go what did not
}

var errBusy = errors.New("the guest is being saved or restored already")

// Adopt makes a restored guest what the request says, and returns when all of it holds. The host has set the clock. A
// host whose stream broke asks again, and waits for what its first request began. In a clone of a template programs run
// on a moment later: they would take the processor from the answer.
func (g *Guest) Adopt(ctx context.Context, r *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error) {
	if err := lock(ctx, g.turn.TryLock); err != nil {
		return nil, fmt.Errorf("%w: %w", errBusy, err)
	}
	after, err := g.adopt(ctx, r)
	late := g.late && r.GetIdentity() != nil
	g.late = g.late && err != nil
	g.turn.Unlock()
	if err != nil {
		return nil, err
	}
	switch {
	case after != nil && g.Later != nil:
		g.Later(ctx, after)
	case after != nil:
		after()
	}
	return &agentv1.AdoptResponse{Late: late}, nil
}

// adopt returns what is left to do when the caller has its answer; nil: nothing.
func (g *Guest) adopt(ctx context.Context, r *agentv1.AdoptRequest) (after func(), err error) {
	t := &times{}
	before := []step{
		{"thaw disks", g.held.thawDisks},
		{"entropy", func() error { return addEntropy(r.GetEntropy()) }},
	}
	if r.GetGrowDisks() { // while nobody writes: a file system that grows takes no writes
		before = append(before, step{"grow", func() error { return growAll(g.Disks) }})
	}
	if err := t.run(before); err != nil {
		return nil, err
	}
	h, id := g.held, r.GetIdentity()
	switch {
	case id == nil:
		return nil, t.run([]step{{"announce", identity.Announce}, {"thaw", g.release}})
	case g.isAlready(id):
		return nil, g.releaseStuck()
	case h != nil && h.template:
		if err = t.run(g.firstIdentity(h, id)); err == nil {
			h.told = true
			rest := g.beginRest(time.Duration(r.GetRestMillis()) * time.Millisecond)
			after = func() { g.runOn(h, t, rest) }
		}
	default:
		err = g.change(ctx, t, id)
	}
	g.became = nil
	if err == nil {
		g.became = id
	}
	return after, err
}

// isAlready tells that programs run as whom id says, or are about to: the answer to somebody who asked for the very same
// was lost. They would lose their connections, and see another boot id, were it done again.
func (g *Guest) isAlready(id *agentv1.GuestConfig) bool {
	return (g.held == nil || g.held.told) && g.became != nil && proto.Equal(g.became, id)
}
