// Package lock holds the lock file that makes bangerd the only one of its state directory. The
// file tells who holds it, so that a client can find a daemon that no longer answers.
package lock

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/gofrs/flock"

	"banger/internal/fault"
)

// Holder is the daemon that holds the lock, or held it last.
type Holder struct {
	PID       int       `json:"pid"`
	StartTime uint64    `json:"start_time"` // field 22 of /proc/<pid>/stat
	Build     string    `json:"build"`
	Since     time.Time `json:"since"`
}

// Lock is a held lock. It ends with the process at the latest.
type Lock struct{ file *flock.Flock }

// Acquire takes the lock at path and writes h into it. When another daemon holds it, the error is
// a Conflict fault that names it.
func Acquire(path string, h Holder) (*Lock, error) {
	f := flock.New(path, flock.SetPermissions(0o600), flock.SetFlag(os.O_CREATE|os.O_RDWR))
	ok, err := f.TryLock()
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot lock %s", path)
	}
	if !ok {
		_ = f.Close()
		return nil, taken(path)
	}
	l := &Lock{file: f}
	if err := write(path, h); err != nil {
		return nil, errors.Join(err, l.Release())
	}
	return l, nil
}

func taken(path string) error {
	who := "another bangerd"
	if h, err := Read(path); err == nil {
		who = fmt.Sprintf("bangerd with pid %d (build %s)", h.PID, h.Build)
	}
	return fault.New(fault.Conflict, "%s already serves this state directory", who).
		WithHint("banger daemon status tells about it; banger daemon stop ends it")
}

// write replaces the file's content in place: a new file would not be the one that is locked.
func write(path string, h Holder) error {
	data, err := json.Marshal(h)
	if err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot describe the daemon")
	}
	if err := os.WriteFile(path, append(data, '\n'), 0o600); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write %s", path)
	}
	return nil
}

// Release gives the lock back. The file stays: removing it would let two daemons lock two files.
func (l *Lock) Release() error { return l.file.Close() }

// Read tells who holds the lock at path or held it last. Whether that process still runs is for
// the caller to check, by pid and start time. No such file is a NotFound fault.
func Read(path string) (Holder, error) {
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return Holder{}, fault.New(fault.NotFound, "no daemon has run here yet")
	}
	if err != nil {
		return Holder{}, fault.Wrap(fault.Precondition, err, "cannot read %s", path)
	}
	var h Holder
	if err := json.Unmarshal(data, &h); err != nil || h.PID <= 1 {
		return Holder{}, fault.New(fault.NotFound, "%s does not name a daemon", path)
	}
	return h, nil
}
