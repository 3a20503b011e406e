package adopt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/proto"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/identity"
	"banger/internal/agent/run"
)

const (
	systemctl = "/usr/bin/systemctl"
	// bootWait is how long a guest may take until systemd has nothing more to start.
	bootWait   = 5 * time.Minute
	settlePoll = 500 * time.Millisecond
	stopWait   = 30 * time.Second
)

// Quiesce makes the guest ready to be saved. It waits a moment for its turn: a clone that has just answered may be about
// to let its programs run.
func (g *Guest) Quiesce(ctx context.Context, r *agentv1.QuiesceRequest) (*agentv1.QuiesceResponse, error) {
	waiting, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	if lock(waiting, g.turn.TryLock) != nil {
		return nil, errBusy
	}
	defer g.turn.Unlock()
	if g.isUntold() {
		return nil, errUntold
	}
	ctx, cancel = sooner(ctx)
	defer cancel()
	if err := g.quiesce(ctx, r); err != nil {
		return nil, err
	}
	var response agentv1.QuiesceResponse
	if g.held != nil {
		response.HeldNanos, response.Lacking = int64(time.Since(g.held.since)), g.held.lacking
	}
	return &response, nil
}

// answerTime is kept of the host's patience: it is told what took too long.
const answerTime = time.Second

func sooner(ctx context.Context) (context.Context, context.CancelFunc) {
	deadline, ok := ctx.Deadline()
	if !ok || time.Until(deadline) < 4*answerTime {
		return context.WithCancel(ctx)
	}
	return context.WithDeadline(ctx, deadline.Add(-answerTime))
}

var errUntold = errors.New("the guest stands still until it is told who it is, and was not yet")

// isUntold tells that programs stand still for Adopt alone: somebody who holds them anew would let them go before.
func (g *Guest) isUntold() bool {
	h := g.held
	return h != nil && h.tries == 0 && !h.told && (h.template || h.machine != g.Machine())
}

func (g *Guest) quiesce(ctx context.Context, r *agentv1.QuiesceRequest) error {
	if r.GetForTemplate() {
		if err := g.settle(ctx); err != nil {
			return err
		}
		if err := g.forget(ctx); err != nil {
			return err
		}
		if err := g.prepare(ctx); err != nil {
			return err
		}
	}
	if r.GetHold() && g.Ready != nil {
		if err := g.Ready(ctx); err != nil {
			return err
		}
	}
	err := g.sync(ctx)
	if err == nil && r.GetHold() {
		err = g.hold(ctx, forCopy)
	}
	return err
}

// sync writes what is in memory to the disks. A disk that does not answer holds up the kernel, not the
// caller; there is never a second sync behind such a one.
func (g *Guest) sync(ctx context.Context) error {
	if g.syncing != nil { // what was written since it began may not be in it
		if err := g.synced(ctx); err != nil {
			return err
		}
	}
	done := make(chan struct{})
	g.syncing = done
	go func() {
		defer close(done)
		identity.ReadyToHangUp() // reads a disk
		unix.Sync()
	}()
	return g.synced(ctx)
}

func (g *Guest) synced(ctx context.Context) error {
	select {
	case <-g.syncing:
		g.syncing = nil
		return nil
	case <-ctx.Done():
		return fmt.Errorf("the guest's disks do not take what is to be written: %w", ctx.Err())
	}
}

// settle waits until systemd has started all it wants to: a template is a finished boot.
func (g *Guest) settle(ctx context.Context) error {
	if !g.Systemd() {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, bootWait)
	defer cancel()
	for {
		// Its exit code tells the state again, or that systemd does not listen yet.
		out, _ := run.Output(ctx, bootWait, systemctl, "is-system-running", "--wait")
		state := strings.TrimSpace(string(out))
		switch state {
		case "running", "degraded":
			if idle, err := noJobs(ctx); idle || err != nil {
				return err
			}
		case "stopping", "maintenance":
			return fmt.Errorf("systemd is %s", state)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("systemd has not started everything, it is %q: %w", state, ctx.Err())
		case <-time.After(settlePoll):
		}
	}
}

func noJobs(ctx context.Context) (bool, error) {
	out, err := run.Output(ctx, stopWait, systemctl, "list-jobs", "--no-legend", "--plain")
	if err != nil {
		return false, fmt.Errorf("list systemd's jobs: %w", err)
	}
	return !strings.Contains(string(out), "\n"), nil
}

// forget removes what would be the same in all clones of this guest. The page cache stays: of a memory that is
// mapped only what is touched costs anything, pages let go are not given back to the host, and what clones run first
// they find there.
func (g *Guest) forget(ctx context.Context) error {
	debug.FreeOSMemory() // the agent's own memory is saved, too
	if err := forgetSeeds(); err != nil {
		return err
	}
	err := os.Remove("/var/lib/systemd/credential.secret")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if !g.Systemd() {
		return nil
	}
	return startAhead(ctx)
}

const (
	// holdMost is how long programs stand still for somebody who is heard of no more.
	holdMost = 10 * time.Second

	startWait = 5 * time.Second // for programs that are just being started, or let go
	lockPoll  = time.Millisecond
)

// hold lets all programs stand still, so that a copy of the guest knows who it is before any of them runs; and of a guest
// that is copied the file systems, so that what is on its disks is whole.
func (g *Guest) hold(ctx context.Context, purpose string) error {
	if err := g.release(); err != nil { // whoever held them before has not been heard of since
		return err
	}
	h := &held{template: purpose == forTemplate, machine: g.Machine(), end: func() {}}
	if g.StartGuard != nil { // the clones of a template have it from the saved memory
		var err error
		if h.guard, h.end, err = g.StartGuard(ctx); err != nil {
			return fmt.Errorf("start the guard: %w", err)
		}
	}
	if err := g.stopStarts(ctx); err != nil {
		h.end()
		return err
	}
	h.since = time.Now()
	g.held, g.late = h, false
	if err := g.still(ctx, h, purpose); err != nil {
		return errors.Join(err, g.release())
	}
	time.AfterFunc(holdMost, func() {
		g.turn.Lock()
		defer g.turn.Unlock()
		// A copy that was not told yet who it is must not run on as the one it was made of.
		if g.held == h && !h.template && !h.runs && h.machine == g.Machine() {
			g.late = true
			g.releaseAlone()
		}
	})
	return nil
}

// still stops programs, and then file systems.
func (g *Guest) still(ctx context.Context, h *held, purpose string) error {
	if err := g.begin(purpose, h.machine); err != nil {
		return err
	}
	thaw, err := g.Freeze(ctx, h.guard, g.note)
	switch {
	case errors.Is(err, errors.ErrUnsupported):
		h.lacking = append(h.lacking, fmt.Sprintf("its programs do not stand still: %v", err))
	case err != nil: // it may not have let go all that it stopped
		h.thaw = g.thawNoted
		return err
	default:
		h.thaw = thaw
	}
	if h.template { // its clones write who they are while programs stand still
		return nil
	}
	disks, why, err := freezeDisks(ctx, g.Disks)
	h.disks = disks
	if why != "" {
		h.lacking = append(h.lacking, "its file systems are written out, and do not stand still: "+why)
	}
	return err
}

// Starting is held by whoever starts a program: none is started while programs stand still, see cgroup.Freeze.
// In a clone that rests they run on for it.
func (g *Guest) Starting() sync.Locker { return wanting{g} }

// stopStarts takes the lock that Starting shares. A program on a disk that does not answer is being started for ever.
func (g *Guest) stopStarts(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	if err := lock(ctx, g.starting.TryLock); err != nil {
		return fmt.Errorf("a program is being started: %w", err)
	}
	return nil
}

// lock takes a lock, unless ctx ends before.
func lock(ctx context.Context, try func() bool) error {
	for !try() {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lockPoll):
		}
	}
	return nil
}

// prepare does ahead what clones of a template need not do each: there is a file to write the boot id into, the network is
// silent, and sshd reads its keys again as soon as it runs on.
func (g *Guest) prepare(ctx context.Context) error {
	if err := newBootID(g.Dir); err != nil {
		return err
	}
	network, err := identity.Silence()
	if err != nil {
		return err
	}
	if err := g.hold(ctx, forTemplate); err != nil {
		return err
	}
	g.held.network = network
	rehearse()
	_, err = g.restartSSHD() // if it was not started ahead; the signals wait with whom they are for
	return errors.Join(err, goAhead())
}

// rehearse reads a message of the kind a clone will get: what the library makes of a message at its first sight is made.
func rehearse() {
	sample := &agentv1.AdoptRequest{Entropy: make([]byte, 32), Identity: &agentv1.GuestConfig{
		Hostname: "x", MachineId: "x", Disks: []*agentv1.Disk{{}}, Interfaces: []*agentv1.Interface{{Mac: "x", Addresses: []string{"x"}}},
		Nameservers: []string{"x"}, Hosts: []*agentv1.HostEntry{{Address: "x", Names: []string{"x"}}}, SshHostKey: "x", AuthorizedKeys: []string{"x"},
	}}
	for _, m := range []proto.Message{sample, &agentv1.AdoptResponse{}, &agentv1.SetTimeRequest{StepNanos: 1}, &agentv1.SetTimeResponse{StepNanos: 1}} {
		if b, err := proto.Marshal(m); err == nil {
			_ = proto.Unmarshal(b, m)
		}
	}
}

// forgetSeeds removes what the next boot would begin its random numbers with.
func forgetSeeds() error {
	err := os.Remove("/var/lib/systemd/random-seed")
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}
