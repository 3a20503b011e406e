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

	"golang.org/x/sync/errgroup"
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

	turn sync.Mutex
	// syncing is a sync that a dead disk holds up; there is at most one.
	syncing chan struct{}
}

var errBusy = errors.New("the guest is being saved or restored already")

// timesFile holds, below Dir, how long each step of the last Adopt took.
const timesFile = "adopt.times"

// Adopt makes a restored guest what the request says, and returns when all of it holds. The
// step is how far the clock was behind.
func (g *Guest) Adopt(ctx context.Context, r *agentv1.AdoptRequest) (step time.Duration, err error) {
	if !g.turn.TryLock() {
		return 0, errBusy
	}
	defer g.turn.Unlock()
	t := &times{begin: time.Now()}
	// First of all: the host's time ages.
	err = t.run("clock", func() error { step, err = SetTime(time.Unix(0, r.GetUnixNanos())); return err })
	if err != nil {
		return 0, err
	}
	if err := t.run("entropy", func() error { return addEntropy(r.GetEntropy()) }); err != nil {
		return step, err
	}
	if id := r.GetIdentity(); id != nil {
		err = g.become(ctx, t, id, r.GetGrowDisks())
	} else {
		err = g.resume(t, r.GetGrowDisks())
	}
	if err != nil {
		return step, err
	}
	t.add("all", t.begin)
	return step, os.WriteFile(filepath.Join(g.Dir, timesFile), []byte(t.String()), 0o644)
}

// resume goes on as the same VM.
func (g *Guest) resume(t *times, grow bool) error {
	if err := t.run("announce", identity.Announce); err != nil {
		return err
	}
	if !grow {
		return nil
	}
	return t.run("grow", func() error { return growAll(g.Disks) })
}

// become makes the guest another VM. Nobody reaches it before sshd has let go of the old key. Steps that do not
// depend on each other run at the same time, for most of them wait for somebody.
func (g *Guest) become(ctx context.Context, t *times, id *agentv1.GuestConfig, grow bool) error {
	var network *identity.Network
	err := t.run("silence", func() (err error) { network, err = identity.Silence(); return err })
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	step := func(name string, f func() error) { group.Go(func() error { return t.run(name, f) }) }
	keys := make(chan struct{})
	step("keys", func() error {
		if err := identity.WriteKeys("/", id); err != nil {
			return err
		}
		if err := restartSSHD(ctx); err != nil {
			return err
		}
		close(keys)
		return nil
	})
	hungUp := make(chan struct{})
	step("hang up", func() error {
		defer close(hungUp)
		// What the kernel cannot end stays until it times out: its address is gone.
		if err := identity.HangUp(); err != nil {
			return tellJournal("connections of the machine this one was made of are left: " + err.Error())
		}
		return nil
	})
	step("names", func() error { return g.rename(ctx, id) })
	step("boot id", func() error { return errors.Join(newBootID(g.Dir), forgetSeeds()) })
	step("network", func() error {
		if err := network.Prepare(id.GetInterfaces()); err != nil {
			return err
		}
		for _, before := range []chan struct{}{keys, hungUp} {
			select {
			case <-before:
			case <-ctx.Done(): // another step has failed
				return ctx.Err()
			}
		}
		return t.run("raise", network.Raise)
	})
	if err := group.Wait(); err != nil {
		return err
	}
	if grow { // not beside the others: a file system that grows takes no writes
		if err := t.run("grow", func() error { return growAll(g.Disks) }); err != nil {
			return err
		}
	}
	return tellJournal("This machine was restored from memory and is now " + id.GetHostname())
}

// rename writes the machine's names, and has the journal begin anew under them.
func (g *Guest) rename(ctx context.Context, id *agentv1.GuestConfig) error {
	old, err := machineID()
	if err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(id.GetHostname())); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := identity.WriteNames("/", id); err != nil {
		return err
	}
	return g.renewJournal(ctx, old, id.GetMachineId())
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
	mu    sync.Mutex
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
	t.mu.Lock()
	defer t.mu.Unlock()
	fmt.Fprintf(&t.text, "%s %.1f ms\n", name, float64(time.Since(begin).Microseconds())/1000)
}

// String lists the steps in the order of their ends.
func (t *times) String() string { return t.text.String() }
