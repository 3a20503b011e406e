package adopt

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

// In software emulation a clone translates anew all code that its programs run when they go on: for a second or two it has
// a processor of the host's to itself. Nobody waits for that but who wants one of them, and clones that are made at
// the same time do without that processor. So they rest a little, the SSH server less than all others, and those who
// want them say so.

// restSSH: the SSH server rests for this part of the time, one sixth.
const restSSH = 6

// rest is that of a clone's programs.
type rest struct {
	most       time.Duration
	ssh, other chan struct{} // closed when they are wanted
	done       chan struct{} // closed when they run, or do not for another reason
}

// beginRest begins the rest, from when the caller has its answer.
func (g *Guest) beginRest(most time.Duration) *rest {
	r := &rest{most, make(chan struct{}), make(chan struct{}), make(chan struct{})}
	g.restMu.Lock()
	defer g.restMu.Unlock()
	g.resting = r
	return r
}

// wait waits until they are wanted, or have rested that long.
func wait(wanted <-chan struct{}, most time.Duration) {
	select {
	case <-wanted:
	case <-time.After(most):
	}
}

// Want ends the rest: somebody wants programs to run.
func (g *Guest) Want() { g.want(true) }

// want ends the rest of the SSH server, or of all.
func (g *Guest) want(all bool) {
	g.restMu.Lock()
	defer g.restMu.Unlock()
	if g.resting == nil {
		return
	}
	closeOnce(g.resting.ssh)
	if all {
		closeOnce(g.resting.other)
	}
}

// awaitRest returns when nothing is left to do of the rest.
func (g *Guest) awaitRest() {
	g.restMu.Lock()
	r := g.resting
	g.restMu.Unlock()
	if r != nil {
		<-r.done
	}
}

// closeOnce closes a channel that only its caller's lock guards.
func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// thawSSH lets the SSH server run on before all others.
func (g *Guest) thawSSH(h *held) {
	g.turn.Lock()
	defer g.turn.Unlock()
	if g.held != h {
		return
	}
	err := os.WriteFile(filepath.Join(filepath.Dir(sshdGroup), "cgroup.freeze"), []byte("0"), 0)
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // an image without sshd
		fmt.Fprintf(os.Stderr, "banger: agent: the SSH server runs on later: %v\n", err)
	}
}

// wanting is a lock whose holder wants programs to run, and waits until they do.
type wanting struct{ g *Guest }

func (w wanting) Lock() {
	w.g.Want()
	w.g.awaitRest()
	w.g.starting.RLock()
}

func (w wanting) Unlock() { w.g.starting.RUnlock() }
