package machine

import (
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Bounds of a machine's logs. A guest writes its console as it likes, and VMMs have no limit for it. The logs are
// opened for appending, so they can be cut while they are written; what is not (Firecracker's own log, which says little)
// goes on behind a hole.
const (
	trimEvery = 10 * time.Second
	trimAbove = 8 << 20 // bytes; a log and its predecessor take some twice that
)

// Trimmer keeps logs short while machines run. It needs no goroutine, and rests without machines.
type Trimmer struct {
	mu    sync.Mutex
	logs  map[string]int // how often it is watched
	timer *time.Timer
}

// Watch begins to watch logs; the function returned ends it.
func (t *Trimmer) Watch(logs ...string) func() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.logs == nil {
		t.logs = map[string]int{}
	}
	for _, l := range logs {
		t.logs[l]++
	}
	if t.timer == nil {
		t.timer = time.AfterFunc(trimEvery, t.tick)
	}
	return sync.OnceFunc(func() { t.unwatch(logs) })
}

func (t *Trimmer) unwatch(logs []string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, l := range logs {
		if t.logs[l]--; t.logs[l] <= 0 {
			delete(t.logs, l)
		}
	}
	if len(t.logs) == 0 && t.timer != nil {
		t.timer.Stop()
		t.timer = nil
	}
}

func (t *Trimmer) tick() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for l := range t.logs {
		// A log that cannot be cut now is looked at again soon.
		_ = trim(l, trimAbove)
	}
	if t.timer != nil {
		t.timer.Reset(trimEvery)
	}
}

// trim moves the end of a log that is above most to its predecessor and empties it. What is written
// between the two is lost.
func trim(path string, most int64) error {
	var info unix.Stat_t
	if err := unix.Stat(path, &info); err != nil {
		return err
	}
	// What it takes, not its length: a VMM that does not append goes on behind the hole that the cut has left.
	if min(info.Size, info.Blocks*512) <= most {
		return nil
	}
	from, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer from.Close()
	if _, err := from.Seek(info.Size-most, io.SeekStart); err != nil {
		return err
	}
	to, err := os.OpenFile(path+".1", os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return err
	}
	_, err = io.CopyN(to, from, most)
	if cerr := to.Close(); err == nil {
		err = cerr
	}
	if terr := from.Truncate(0); err == nil {
		err = terr
	}
	return err
}
