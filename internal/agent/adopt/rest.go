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
// the same time do without that processor. So all but the SSH server rest a little, and those who want them say so.

// beginRest begins the rest, from when the caller has its answer; what it returns waits for its end.
func (g *Guest) beginRest(most time.Duration) (wait func()) {
	wanted := make(chan struct{})
	g.restMu.Lock()
	defer g.restMu.Unlock()
	g.resting = wanted
	return func() {
		select {
		case <-wanted:
		case <-time.After(most):
		}
	}
}

// Want ends the rest: somebody wants programs to run.
func (g *Guest) Want() {
	g.restMu.Lock()
	defer g.restMu.Unlock()
	if g.resting != nil {
		close(g.resting)
		g.resting = nil
	}
}

// thawSSH lets the SSH server run on before all others: it is the first that somebody wants, and reads its key.
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

// wanting is a lock whose holder wants programs to run.
type wanting struct{ g *Guest }

func (w wanting) Lock() {
	w.g.Want()
	w.g.starting.RLock()
}

func (w wanting) Unlock() { w.g.starting.RUnlock() }
