package qemu

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"banger/internal/fault"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// Bounds of a migration, which is QEMU's word for saving and restoring.
const (
	migrateTimeout = 10 * time.Minute // a disk that is slower than 10 MB/s is not waited for
	pauseTimeout   = 30 * time.Second // for QEMU to finish and flush what the disks were asked for, on a host that writes much else
	cancelTimeout  = 5 * time.Second
	pollFirst      = time.Millisecond // between looks at a migration
	pollMost       = 20 * time.Millisecond
)

// running is a machine on QEMU that can be paused and saved.
type running struct {
	*machine.Machine
	name  string
	mon   *monitor // nil when an adopted QEMU's does not answer
	facts machine.Facts

	mu    sync.Mutex // one of pause, resume and save at a time
	saved string     // directory of what was saved of a memory file since the last resume
}

var (
	_ vmm.Pauser = (*running)(nil)
	_ vmm.Saver  = (*running)(nil)
	_ vmm.Writer = (*running)(nil)
)

// Status words of QEMU (qapi/run-state.json: RunState).
const (
	statusRunning     = "running"
	statusIncoming    = "inmigrate"
	statusPostMigrate = "postmigrate" // saved, and not resumed since
)

func runState(ctx context.Context, mon *monitor) (string, error) {
	var s struct {
		Status string `json:"status"`
	}
	err := mon.callFor(ctx, "query-status", &s)
	return s.Status, err
}

// halfRestored tells whether QEMU waits for saved state that nobody gives it any more.
func halfRestored(ctx context.Context, mon *monitor) bool {
	s, err := runState(ctx, mon)
	return err == nil && s == statusIncoming
}

// hold takes the machine's turn, which release ends.
func (r *running) hold() (release func(), err error) {
	select {
	case <-r.Done():
		return nil, r.gone()
	default:
	}
	if r.mon == nil {
		return nil, fault.New(fault.Precondition, "QEMU of %s does not answer: it can only be stopped", r.name)
	}
	r.mu.Lock()
	return r.mu.Unlock, nil
}

func (r *running) gone() error {
	return fault.New(fault.Conflict, "the machine %s has ended", r.name)
}

// told turns the error of a monitor that hung up into that of a machine that has ended.
func (r *running) told(err error) error {
	if err == nil {
		return nil
	}
	select {
	case <-r.mon.done:
		return fault.Wrap(fault.Conflict, err, "the machine %s has ended", r.name)
	default:
		return err
	}
}

// Pause halts the guest's processors; its devices' requests are finished first.
func (r *running) Pause(ctx context.Context) error {
	release, err := r.hold()
	if err != nil {
		return err
	}
	defer release()
	return r.told(r.mon.call(ctx, command{name: "stop", most: pauseTimeout}, nil))
}

// Resume lets the guest run. A Save that a daemon began and did not live to finish is given up.
func (r *running) Resume(ctx context.Context) error {
	release, err := r.hold()
	if err != nil {
		return err
	}
	defer release()
	if err := cancelMigration(ctx, r.mon); err != nil {
		return r.told(err)
	}
	if r.saved != "" {
		// The memory file changes from now on.
		if err := machine.RemoveSaved(r.saved); err != nil {
			return fault.Wrap(fault.Precondition, err, "cannot remove what was saved of %s", r.name)
		}
		r.saved = ""
	}
	return r.told(r.mon.callFor(ctx, "cont", nil))
}

// Save writes the machine's state as a migration into a file.
func (r *running) Save(ctx context.Context, dir string) error {
	seal, err := r.Write(ctx, dir)
	if err != nil {
		return err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if err := seal(ctx); err != nil {
		return err
	}
	if r.facts.MemoryFile != "" {
		r.saved = dir
	}
	return nil
}

// Write is the part of Save for which the guest has to stand still.
func (r *running) Write(ctx context.Context, dir string) (seal func(context.Context) error, err error) {
	release, err := r.hold()
	if err != nil {
		return nil, err
	}
	defer release()
	manifest, err := r.manifest(ctx, dir)
	if err != nil {
		return nil, r.told(err)
	}
	if err := r.writeState(ctx, dir); err != nil {
		return nil, errors.Join(r.told(err), machine.RemoveSaved(dir))
	}
	return func(ctx context.Context) error {
		if err := machine.WriteSaved(ctx, dir, manifest, r.facts.MemoryFile != ""); err != nil {
			return errors.Join(err, machine.RemoveSaved(dir))
		}
		return nil
	}, nil
}

// manifest asks QEMU what it is, and finds reasons not to save it.
func (r *running) manifest(ctx context.Context, dir string) (machine.Saved, error) {
	var s machine.Saved
	status, err := runState(ctx, r.mon)
	switch {
	case err != nil:
		return s, err
	case status == statusRunning:
		return s, fault.New(fault.Conflict, "the machine %s runs: it can be saved when it is paused", r.name)
	case status == statusPostMigrate:
		return s, fault.New(fault.Conflict, "the machine %s was saved already and has not run since", r.name)
	}
	if err := r.facts.Saveable(r.name, dir); err != nil {
		return s, err
	}
	var version struct {
		QEMU    struct{ Major, Minor, Micro int } `json:"qemu"`
		Package string                            `json:"package"`
	}
	if err := r.mon.callFor(ctx, "query-version", &version); err != nil {
		return s, err
	}
	v := version.QEMU
	s = r.facts.Saved()
	s.VMM, s.CPUModel = Name, machine.HostCPU(s.Accelerator)
	s.Build = buildName(fmt.Sprintf("%d.%d.%d", v.Major, v.Minor, v.Micro), version.Package)
	s.Disks, err = r.disks(ctx)
	return s, err
}

// disks are the sizes that the guest knows.
func (r *running) disks(ctx context.Context) ([]machine.SavedDisk, error) {
	var nodes []struct {
		Name  string `json:"node-name"`
		Image struct {
			Bytes int64 `json:"virtual-size"`
		} `json:"image"`
	}
	if err := r.mon.callFor(ctx, "query-named-block-nodes", &nodes); err != nil {
		return nil, err
	}
	sizes := map[string]int64{}
	for _, n := range nodes {
		sizes[n.Name] = n.Image.Bytes
	}
	var disks []machine.SavedDisk
	for _, d := range r.facts.Disks {
		d.Bytes = sizes[d.Role]
		disks = append(disks, d)
	}
	return disks, nil
}

// stateName names the state file in QEMU's monitor.
const stateName = "state"

// writeState writes devices, and memory that is in no shared file. On error nothing of it goes on.
func (r *running) writeState(ctx context.Context, dir string) error {
	f, err := os.OpenFile(filepath.Join(dir, vmm.SavedState), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o600)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot save %s", r.name)
	}
	defer f.Close()
	if err := prepareMigration(ctx, r.mon); err != nil {
		return err
	}
	get := command{name: "getfd", args: map[string]any{"fdname": stateName}, file: f}
	if err := r.mon.call(ctx, get, nil); err != nil {
		return err
	}
	err = r.mon.call(ctx, command{name: "migrate", args: map[string]any{"uri": "fd:" + stateName}}, nil)
	if err == nil {
		err = awaitMigration(ctx, r.mon)
	}
	if err == nil {
		return nil
	}
	if cerr := cancelMigration(context.WithoutCancel(ctx), r.mon); cerr != nil {
		return errors.Join(err, cerr)
	}
	return r.whyNotWritten(f, err)
}

// whyNotWritten asks the file why it could not be written to: QEMU does not say.
func (r *running) whyNotWritten(f *os.File, err error) error {
	if fault.KindOf(err) != fault.Unexpected {
		return err
	}
	if _, werr := f.Write(make([]byte, 1<<16)); werr != nil {
		return fault.Wrap(fault.Precondition, werr, "cannot save %s", r.name).WithHint("free some space on this disk")
	}
	return err
}

// prepareMigration sets what must be the same at both ends, and takes the brakes off.
func prepareMigration(ctx context.Context, mon *monitor) error {
	type capability struct {
		Name  string `json:"capability"`
		State bool   `json:"state"`
	}
	// Memory in a shared file is not written to the stream.
	err := mon.call(ctx, command{name: "migrate-set-capabilities", args: map[string]any{
		"capabilities": []capability{{"x-ignore-shared", true}},
	}}, nil)
	if err != nil {
		return err
	}
	return mon.call(ctx, command{name: "migrate-set-parameters", args: map[string]any{
		"max-bandwidth": int64(math.MaxInt64 >> 16), // bytes a second
		// The guest announces its address itself: the one in its memory may be another machine's.
		"announce-rounds": 0,
	}}, nil)
}

type migration struct {
	Status string `json:"status"` // qapi/migration.json: MigrationStatus; empty before the first one
	Error  string `json:"error-desc"`
}

// awaitMigration waits for the end of a migration, on either side. While QEMU reads state from a file it answers
// nothing: the bound is the whole migration's.
func awaitMigration(ctx context.Context, mon *monitor) error {
	ctx, cancel := context.WithTimeout(ctx, migrateTimeout)
	defer cancel()
	for pause := pollFirst; ; pause = min(2*pause, pollMost) {
		var m migration
		if err := mon.call(ctx, command{name: "query-migrate", most: migrateTimeout}, &m); err != nil {
			return err
		}
		switch m.Status {
		case "completed":
			return nil
		case "failed", "cancelled":
			return fault.New(fault.Unexpected, "%s", strings.TrimSpace("QEMU's migration "+m.Status+" "+m.Error))
		}
		if err := sleep(ctx, pause); err != nil {
			return fault.Wrap(fault.KindOf(err), err, "QEMU's migration did not end")
		}
	}
}

// cancelMigration ends a migration that is under way, and waits for it.
func cancelMigration(ctx context.Context, mon *monitor) error {
	ctx, cancel := context.WithTimeout(ctx, cancelTimeout)
	defer cancel()
	for pause := pollFirst; ; pause = min(2*pause, pollMost) {
		var m migration
		if err := mon.callFor(ctx, "query-migrate", &m); err != nil {
			return err
		}
		switch m.Status {
		case "", "none", "completed", "failed", "cancelled":
			return nil
		case "cancelling":
		default:
			if err := mon.callFor(ctx, "migrate_cancel", nil); err != nil {
				return err
			}
		}
		if err := sleep(ctx, pause); err != nil {
			return fault.Wrap(fault.KindOf(err), err, "QEMU's migration cannot be cancelled")
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
