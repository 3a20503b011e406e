package adopt

import (
	"errors"
	"fmt"
	"os"
	"time"
)

const (
	// againMost is how often the agent tries by itself to let go what did not, and againPause how long it waits before.
	againMost  = 20
	againPause = time.Second
)

// release lets file systems and programs run on. What does not is still held, and noted for the next agent: it is tried
// again a moment later, and whenever somebody asks for it.
func (g *Guest) release() error {
	h := g.held
	if h == nil {
		return nil
	}
	err := h.thawDisks()
	if !h.runs {
		if thawed := h.thawPrograms(); thawed != nil {
			err = errors.Join(err, thawed)
		} else {
			h.runs = true
			g.starting.Unlock()
		}
	}
	if err != nil {
		g.again(h)
		return err
	}
	g.held = nil
	err = g.end()
	h.end()
	return err
}

// again lets go once more, a while later, unless somebody else has done so.
func (g *Guest) again(h *held) {
	if h.tries++; h.tries > againMost {
		return
	}
	time.AfterFunc(againPause, func() {
		g.turn.Lock()
		defer g.turn.Unlock()
		if g.held == h {
			g.releaseAlone()
		}
	})
}

// releaseAlone is release when nobody waits to be told. The first failure and the last one are, where people look.
func (g *Guest) releaseAlone() {
	h := g.held
	if err := g.release(); err != nil && (h.tries == 1 || h.tries > againMost) {
		fmt.Fprintf(os.Stderr, "banger: agent: some of this guest stands still, try %d: %v\n", h.tries, err)
	}
}

// releaseStuck tries once more what could not be let go, for somebody who asks; what still has its time is left alone.
func (g *Guest) releaseStuck() error {
	if g.held == nil || g.held.tries == 0 {
		return nil
	}
	return g.release()
}

func (h *held) thawPrograms() error {
	if h.thaw == nil {
		return nil
	}
	return h.thaw()
}

// thawDisks lets the file systems go on. A guest that becomes another one does so first: it has something to write.
func (h *held) thawDisks() (err error) {
	if h == nil {
		return nil
	}
	h.disks, err = thawDisks(h.disks)
	return err
}

// thawNoted lets go what the record says.
func (g *Guest) thawNoted() error {
	left, err := g.left()
	if left == nil || err != nil {
		return err
	}
	return g.thawGroups(left.groups)
}

// thawGroups lets groups run on. Where none was noted there may be nothing to thaw by: a kernel may have no control groups.
func (g *Guest) thawGroups(groups []string) error {
	if len(groups) == 0 {
		return nil
	}
	return g.Thaw(groups)
}
