package adopt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/identity"
)

// firstIdentity are the steps that make a clone of a template a VM. Until the last of them nobody reaches it over the
// network. One follows the other: they have one processor's work to do, and wait for nobody. sshd has a signal
// waiting, which is the first thing it will know of.
func (g *Guest) firstIdentity(h *held, id *agentv1.GuestConfig) []step {
	return []step{
		{"silence", h.silence},
		{"keys", func() error { return identity.WriteKeys("/", id) }},
		{"names", func() error { return rename(id) }},
		{"boot id", func() error { return newBootID(g.Dir) }},
		{"addresses", func() error { return h.network.Prepare(id.GetInterfaces()) }},
		{"raise", func() error { return h.network.Raise() }},
		{"note", func() error { return g.note(toldLine) }}, // from here on the next agent lets programs run, too
	}
}

// silence has been done in the template, unless the agent that did it died.
func (h *held) silence() (err error) {
	if h.network == nil {
		h.network, err = identity.Silence()
	}
	return err
}

// runOn lets the programs of a template's clone run when they have rested, unless somebody has asked for something else
// meanwhile. Whoever asked for the clone has the answer: a failure is told where people look.
func (g *Guest) runOn(h *held, t *times, r *rest) {
	defer close(r.done)
	wait(r.ssh, r.most/restSSH)
	g.thawSSH(h)
	wait(r.other, r.most-r.most/restSSH)
	g.turn.Lock()
	defer g.turn.Unlock()
	defer h.network.Close()
	if g.held != h || g.became == nil { // somebody said something else, which went wrong
		return
	}
	err := t.run([]step{
		{"thaw", g.release},
		{"journal", func() error { return tellRestored(g.became.GetHostname()) }},
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "banger: agent: after the restore: %v\n", err)
	}
	t.write(g.Dir)
}

// change makes a guest that was in use another VM: what there is of the old one ends.
func (g *Guest) change(ctx context.Context, t *times, id *agentv1.GuestConfig) error {
	if g.was == nil {
		old, err := machineID()
		if err != nil {
			return err
		}
		g.was = &old
		if g.held != nil {
			if err := g.note(wasLine + old); err != nil {
				return err
			}
		}
	}
	network, err := identity.Silence()
	if err != nil {
		return err
	}
	defer network.Close()
	defer t.write(g.Dir)
	var sshd *restart
	err = t.run([]step{
		{"keys", func() error { return identity.WriteKeys("/", id) }},
		{"restart sshd", func() (err error) { sshd, err = g.restartSSHD(); return err }},
		{"hang up", hangUp},
		{"names", func() error { return rename(id) }},
		{"boot id", func() error { return newBootID(g.Dir) }},
		{"seeds", forgetSeeds},
		{"addresses", func() error { return network.Prepare(id.GetInterfaces()) }},
		{"await sshd", func() error {
			if g.held != nil { // the signal is the first thing it will know of
				return nil
			}
			return sshd.wait(ctx)
		}},
		{"raise", network.Raise},
		{"thaw", g.release},
		{"renew journal", func() error { return g.renewJournal(ctx, *g.was, id.GetMachineId()) }},
		{"journal", func() error { return tellRestored(id.GetHostname()) }},
	})
	if err == nil {
		g.was = nil
	}
	return err
}

func tellRestored(name string) error {
	return tellJournal("This machine was restored from memory and is now " + name)
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

// step is one of those that make a guest another VM.
type step struct {
	name string
	f    func() error
}

// times are the durations of the steps.
type times struct{ text strings.Builder }

// timesFile holds, below Guest.Dir, how long each step of the last Adopt took.
const timesFile = "adopt.times"

// write keeps them for whoever looks for what is slow; that /run is full is no reason to fail.
func (t *times) write(dir string) {
	_ = os.WriteFile(filepath.Join(dir, timesFile), []byte(t.text.String()), 0o644)
}

// run takes the steps until one fails.
func (t *times) run(steps []step) error {
	for _, s := range steps {
		begin := time.Now()
		err := s.f()
		fmt.Fprintf(&t.text, "%s %d us\n", s.name, time.Since(begin).Microseconds())
		if err != nil {
			return fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return nil
}
