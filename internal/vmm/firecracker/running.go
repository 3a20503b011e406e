package firecracker

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"

	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// running is a machine on Firecracker that can be paused and saved.
type running struct {
	*machine.Machine
	name, dir string // dir is where Firecracker works
	api       *client
	facts     machine.Facts

	mu    sync.Mutex // one of pause, resume and save at a time
	saved bool       // since the last resume
	void  string     // directory of what was saved of a machine with a memory file: the next resume makes it void

	writing chan struct{}      // closed when the last snapshot has been written, or was not; nil before the first
	life    context.Context    // ends with the machine, or with Close
	end     context.CancelFunc // of life
}

var (
	_ vmm.Pauser = (*running)(nil)
	_ vmm.Saver  = (*running)(nil)
	_ vmm.Writer = (*running)(nil)
)

func (d *Driver) running(m vmm.Machine, p *system.Process, c *client) *running {
	r := &running{name: m.Name, dir: home(m.Dir), api: c, facts: machine.ReadFacts(m.Dir)}
	r.life, r.end = context.WithCancel(context.Background())
	var pressed atomic.Bool
	var halted atomic.Pointer[string]
	group := system.CgroupOf(p.PID(), groupName(m))
	watch := watchHalt(m.Dir, func(line string) {
		halted.Store(&line)
		_ = p.Signal(syscall.SIGTERM) // it may have ended
	})
	untrim := d.trim.Watch(logs(m.Dir)...)
	o := machine.Options{
		Dir: m.Dir, Process: p, Sockets: sockets,
		Streams: func(ctx context.Context) (net.Conn, error) { return dialGuest(ctx, r.dir) },
		Classify: func(s system.ExitStatus, stopped bool) vmm.Exit {
			d.sweep(m.Dir)
			removeGroup(group)
			e := ending{
				stopped: stopped, pressed: pressed.Load(), console: console(m.Dir),
				said: machine.Tail(filepath.Join(m.Dir, vmm.VMMLog), 20),
			}
			if line := halted.Load(); line != nil {
				e.halted = *line
			}
			return judge(s, e)
		},
		Release: func() {
			r.end()
			watch.close()
			untrim()
			r.mu.Lock()
			defer r.mu.Unlock()
			r.awaitWritten(context.Background())
			c.close()
		},
	}
	if d.platform.ctrlAltDel {
		o.PowerButton = func(ctx context.Context) error {
			pressed.Store(true)
			return c.ctrlAltDel(ctx)
		}
	}
	r.Machine = machine.New(o)
	return r
}

// logs are the files that a guest, or time, makes grow.
func logs(dir string) []string {
	var paths []string
	for _, name := range []string{vmm.SerialLog, vmm.VMMLog, MetricsLog, StderrLog} {
		paths = append(paths, filepath.Join(dir, name))
	}
	return paths
}

// hold takes the machine's turn, which release ends.
func (r *running) hold() (release func(), err error) {
	select {
	case <-r.Done():
		return nil, r.gone()
	default:
		r.mu.Lock()
		return r.mu.Unlock, nil
	}
}

func (r *running) gone() error {
	return fault.New(fault.Conflict, "the machine %s has ended", r.name)
}

// Pause halts the guest's processors.
func (r *running) Pause(ctx context.Context) error {
	release, err := r.hold()
	if err != nil {
		return err
	}
	defer release()
	return r.api.setState(ctx, "Paused")
}

// Resume lets the guest run.
func (r *running) Resume(ctx context.Context) error {
	release, err := r.hold()
	if err != nil {
		return err
	}
	defer release()
	if r.void != "" {
		if err := removeSaved(r.void, false); err != nil {
			return fault.Wrap(fault.Precondition, err, "cannot remove what was saved of %s", r.name)
		}
		r.void = ""
	}
	if err := r.api.setState(ctx, "Resumed"); err != nil {
		return err
	}
	r.saved = false
	return nil
}

// removeSaved removes what was saved in dir; the memory only when it is no machine's memory file.
func removeSaved(dir string, memory bool) error {
	if memory {
		if err := os.Remove(filepath.Join(dir, vmm.SavedMemory)); err != nil && !os.IsNotExist(err) {
			return err
		}
	}
	return machine.RemoveSaved(dir)
}
