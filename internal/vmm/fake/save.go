package fake

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// Arguments of the process that are the driver's, not the guest's.
const (
	argRestore    = "fake.restore="
	argMemoryFile = "fake.memory-file="
)

// lastWords is how long the news of a process's end may come after its socket broke.
const lastWords = 500 * time.Millisecond

// running is a fake machine that can be paused and saved.
type running struct {
	*machine.Machine
	name, dir string
	facts     machine.Facts

	mu    sync.Mutex
	saved string // directory of what was saved of a memory file since the last resume
}

var (
	_ vmm.Pauser = (*running)(nil)
	_ vmm.Saver  = (*running)(nil)
)

// ask has the process do something. What was asked is waited for when ctx ends meanwhile, so that nothing
// goes on behind the caller's back.
func (r *running) ask(ctx context.Context, q request, most time.Duration) error {
	select {
	case <-r.Done():
		return fault.New(fault.Conflict, "the machine %s has ended", r.name)
	default:
	}
	if err := ctx.Err(); err != nil {
		return fault.Wrap(fault.KindOf(err), err, "cannot %s %s", q.Do, r.name)
	}
	var answer reply
	if err := r.exchange(ctx, q, &answer, most); err != nil {
		t := time.NewTimer(lastWords)
		defer t.Stop()
		select {
		case <-r.Done():
			return fault.Wrap(fault.Conflict, err, "the machine %s has ended", r.name)
		case <-t.C:
			return fault.Wrap(fault.Unexpected, err, "cannot %s %s", q.Do, r.name)
		}
	}
	switch {
	case answer.Error == "" && ctx.Err() != nil:
		return fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err(), "cannot %s %s", q.Do, r.name)
	case answer.Error == "":
		return nil
	case answer.Conflict:
		return fault.Wrap(fault.Conflict, stateError(answer.Error), "cannot %s %s", q.Do, r.name)
	case answer.Full:
		return fault.New(fault.Precondition, "cannot %s %s: %s", q.Do, r.name, answer.Error)
	}
	return fault.New(fault.Unexpected, "cannot %s %s: %s", q.Do, r.name, answer.Error)
}

// stateError is errState, with the process's words.
type stateError string

func (e stateError) Error() string { return string(e) }
func (stateError) Unwrap() error   { return errState }

func (r *running) exchange(ctx context.Context, q request, answer *reply, most time.Duration) error {
	conn, err := system.DialUnixIn(context.WithoutCancel(ctx), r.dir, controlSocket)
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(most)); err != nil {
		return err
	}
	if err := json.NewEncoder(conn).Encode(q); err != nil {
		return err
	}
	return json.NewDecoder(conn).Decode(answer)
}

// Pause halts the guest: nothing it is told reaches it, and it says nothing.
func (r *running) Pause(ctx context.Context) error {
	return r.ask(ctx, request{Do: doPause}, controlTimeout)
}

// Resume lets it go on.
func (r *running) Resume(ctx context.Context) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.saved != "" {
		// The memory file changes from now on.
		if err := machine.RemoveSaved(r.saved); err != nil {
			return fault.Wrap(fault.Precondition, err, "cannot remove what was saved of %s", r.name)
		}
		r.saved = ""
	}
	return r.ask(ctx, request{Do: doResume}, controlTimeout)
}

// saveTimeout bounds a save, ArgSlowSave included.
const saveTimeout = time.Minute

// Save has the process write its memory.
func (r *running) Save(ctx context.Context, dir string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := r.facts.Saveable(r.name, dir); err != nil {
		return err
	}
	err := r.ask(ctx, request{Do: doSave, Dir: dir}, saveTimeout)
	if errors.Is(err, errState) {
		return err // nothing was written, and what an earlier save wrote is not ours to remove
	}
	mapped := r.facts.MemoryFile != ""
	if err == nil {
		s := r.facts.Saved()
		s.VMM, s.Build = Name, build
		err = machine.WriteSaved(ctx, dir, s, mapped)
	}
	if err != nil {
		return errors.Join(err, machine.RemoveSaved(dir))
	}
	if mapped {
		r.saved = dir
	}
	return nil
}

// layout is a hash of what must be the same for saved state to fit.
func layout(m vmm.Machine) string {
	h := sha256.New()
	fmt.Fprintln(h, m.CPUs, m.MemoryBytes, len(m.NICs))
	for _, d := range m.Disks {
		fmt.Fprintln(h, d.Role, d.ReadOnly)
	}
	return hex.EncodeToString(h.Sum(nil))
}

// CheckSaved finds what does not fit.
func (d *Driver) CheckSaved(ctx context.Context, m vmm.Machine, dir string) error {
	s, err := machine.ReadSaved(dir)
	if err != nil {
		return err
	}
	return s.Check(ctx, machine.Saved{VMM: Name, Build: build, Accelerator: accelerator, Layout: layout(m)}, m, dir)
}

// Restore starts a process with what was saved.
func (d *Driver) Restore(ctx context.Context, m vmm.Machine, dir string) (vmm.Running, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := d.CheckSaved(ctx, m, dir); err != nil {
		return nil, err
	}
	// They are in the memory.
	m.Kernel, m.Initramfs, m.MemoryFile = "", "", ""
	if err := d.Check(ctx, m); err != nil {
		return nil, err
	}
	r, err := d.start(ctx, m, []string{argRestore + dir})
	if err != nil {
		return nil, err
	}
	if err := r.Resume(ctx); err != nil {
		return nil, errors.Join(err, r.Stop(context.WithoutCancel(ctx)), r.Close())
	}
	return r, nil
}
