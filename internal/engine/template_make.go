package engine

import (
	"context"
	"errors"
	"slices"
	"sync"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/capability"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/system"
	"banger/internal/template"
	"banger/internal/undo"
	"banger/internal/vm"
	"banger/internal/vmm"
)

const (
	// stageKeep is the template's files on stable storage, under its name.
	stageKeep = "keep"

	// settleTimeout bounds how long the guest may take until its init has settled and all is written.
	settleTimeout = 3 * time.Minute

	maxWishes   = 8 // templates waiting to be made; a further one waits for the next create
	maxFailures = 2 // of one template; then this daemon does not try again
	makerNice   = 10
)

// maker makes templates one at a time: those that somebody waits for, and in the background those that creates
// wished for.
type maker struct {
	turn chan struct{} // holds one token while one is made

	mu       sync.Mutex
	wishes   []*wish
	busy     bool // the background worker runs
	failures map[string]int
}

func newMaker() *maker {
	return &maker{turn: make(chan struct{}, 1), failures: map[string]int{}}
}

// blame counts a failure of a template, made or used.
func (m *maker) blame(key string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.failures[key]++
}

// add queues a wish and tells whether a worker has to be started.
func (m *maker) add(w *wish) (start bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	known := slices.ContainsFunc(m.wishes, func(o *wish) bool { return o.key == w.key })
	if known || len(m.wishes) >= maxWishes || m.failures[w.key] >= maxFailures {
		return false
	}
	m.wishes = append(m.wishes, w)
	start, m.busy = !m.busy, true
	return start
}

// first returns the oldest wish; it stays in the queue until done, so that it is not queued again. nil ends the worker.
func (m *maker) first() *wish {
	m.mu.Lock()
	defer m.mu.Unlock()
	if len(m.wishes) == 0 {
		m.busy = false
		return nil
	}
	return m.wishes[0]
}

func (m *maker) done() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.wishes = m.wishes[1:]
}

// wantTemplate has a template made in the background, some time after the create that found none.
func (e *Engine) wantTemplate(w *wish) {
	if e.enter() != nil { // the engine is closing
		return
	}
	if !e.maker.add(w) {
		e.verbs.Done()
		return
	}
	go func() {
		defer e.verbs.Done()
		for w := e.maker.first(); w != nil; w = e.maker.first() {
			e.makeLater(w)
			e.maker.done()
		}
	}()
}

// makeLater makes a template that nobody waits for. Its failure hurts nobody, and is told in the log.
func (e *Engine) makeLater(w *wish) {
	wait := time.NewTimer(e.c.Templates.Settle)
	defer wait.Stop()
	select {
	case <-wait.C:
	case <-e.life.Done():
		return
	}
	begin := time.Now()
	_, err := e.ensureTemplate(e.life, w, true, nil)
	switch {
	case err == nil:
		e.log.Info("template made", "template", w.key, "took", time.Since(begin))
	case e.life.Err() != nil || fault.KindOf(err) == fault.Conflict: // somebody else is at it
		e.log.Info("template not made", "template", w.key, "error", err)
	default:
		e.maker.blame(w.key)
		e.log.Warn("template not made: VMs of this shape boot", "template", w.key, "error", err)
	}
}

// WarmTemplate makes the template that a VM of a spec would be restored from, unless it is there.
func (e *Engine) WarmTemplate(ctx context.Context, spec vm.Spec, sink progress.Sink) (template.Template, error) {
	if err := e.enter(); err != nil {
		return template.Template{}, err
	}
	defer e.verbs.Done()
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	defer context.AfterFunc(e.life, func() { cancel(errClosing) })()
	spec.Name = "template"
	if err := spec.Validate(e.c.Limits); err != nil {
		return template.Template{}, err
	}
	driver, caps, err := e.pickDriver(ctx, spec.VMM)
	if err != nil {
		return template.Template{}, err
	}
	switch {
	case e.c.Templates.Store == nil:
		return template.Template{}, errNoTemplates
	case spec.Balloon:
		return template.Template{}, fault.New(fault.Usage, "VMs with a balloon always boot: there are no templates for them").
			WithHint("leave --balloon out")
	}
	w, err := e.wish(ctx, spec, driver, caps)
	if err != nil {
		return template.Template{}, err
	}
	if w == nil {
		return template.Template{}, fault.New(fault.Precondition, "%s cannot restore VMs from memory: it needs no templates", driver.Name())
	}
	return e.ensureTemplate(ctx, w, false, sink)
}

// ensureTemplate returns the template of a wish, and makes it when it is not there or damaged.
func (e *Engine) ensureTemplate(ctx context.Context, w *wish, gently bool, sink progress.Sink) (template.Template, error) {
	select {
	case e.maker.turn <- struct{}{}:
		defer func() { <-e.maker.turn }()
	case <-ctx.Done():
		return template.Template{}, context.Cause(ctx)
	}
	t, err := e.c.Templates.Store.Get(w.key)
	if err == nil {
		err = e.c.Templates.Store.Verify(ctx, t)
	}
	switch {
	case err == nil:
		return t, nil
	case ctx.Err() != nil:
		return t, context.Cause(ctx)
	}
	sink.Notice("a VM of image " + w.spec.Image + " is booted and saved as a template, from which others start at once")
	t, err = e.makeTemplate(ctx, w, gently, sink)
	if err != nil {
		return t, err
	}
	evicted, err := e.evictTemplates(ctx)
	if len(evicted) > 0 || err != nil {
		e.log.Info("templates evicted", "templates", evicted, "error", err)
	}
	return t, nil
}

// makeTemplate boots a VM of nobody's, saves it as soon as it has settled, and keeps its memory and disks. In any
// case nothing else is left of that VM.
func (e *Engine) makeTemplate(ctx context.Context, w *wish, gently bool, sink progress.Sink) (t template.Template, err error) {
	o := e.nobody(w, sink)
	err = o.stage(ctx, stageCheck, func(ctx context.Context) error { return o.fits(ctx, w.driver, w.caps) })
	if err != nil {
		return t, err
	}
	making, err := e.c.Templates.Store.Begin(w.shape)
	if err != nil {
		return t, err
	}
	u := undo.New()
	defer u.Unwind(ctx, &err)
	u.Push("directory", func(context.Context) error { // nothing is left of the console of one that was made
		return errors.Join(making.KeepLog(vmm.SerialLog), making.Abandon())
	})
	b := &capability.Build{
		Machine: &vmm.Machine{
			ID: o.v.ID, Name: o.v.Spec.Name, Dir: making.Dir, CPUs: o.v.Spec.CPUs, MemoryBytes: o.v.Spec.MemoryBytes,
			MemoryFile: vmm.SavedMemory,
		},
		Guest: &agentv1.GuestConfig{}, Caps: w.caps, Making: true,
	}
	if err := o.capabilitiesUp(ctx, u, b); err != nil {
		return t, err
	}
	m, err := o.spawn(ctx, u, w.driver, b, origin{})
	if err != nil {
		return t, err
	}
	if gently {
		if err := system.Nice(m.running.Handle().PID, makerNice); err != nil {
			e.log.Debug("the machine of a template is not slowed down", "error", err)
		}
	}
	if err := o.awaitGuest(ctx, m, b, origin{}); err != nil {
		return t, err
	}
	if err := o.saveTemplate(ctx, m, making.Dir); err != nil {
		return t, err
	}
	err = o.stage(ctx, stageKeep, func(ctx context.Context) error {
		if err := w.driver.(vmm.Restorer).CheckSaved(ctx, *b.Machine, making.Dir); err != nil { // what nobody can use is not kept
			return err
		}
		t, err = making.Commit(ctx, e.c.Now(), paths.OverlayDisk, paths.WorkDisk)
		return err
	})
	return t, err
}

// nobody is an operation on a VM that has no row.
func (e *Engine) nobody(w *wish, sink progress.Sink) *operation {
	v := vm.VM{ID: vm.NewID(), Spec: w.spec, State: vm.Starting}
	if e.c.MAC != nil {
		v.MAC = e.c.MAC(v.ID)
	}
	return &operation{
		e: e, name: "template", v: v, sink: sink, log: e.log.With("template", w.key), console: e.c.Templates.Store.FailedLog(),
	}
}

// saveTemplate saves a guest that has settled, and ends it without letting it run on: its disks stay as its
// memory knows them.
func (o *operation) saveTemplate(ctx context.Context, m *machine, dir string) error {
	pauser, ok1 := m.running.(vmm.Pauser)
	saver, ok2 := m.running.(vmm.Saver)
	if !ok1 || !ok2 {
		return fault.New(fault.Precondition, "this machine cannot be saved")
	}
	for _, s := range []struct {
		stage string
		f     func(context.Context) error
	}{
		{stageQuiesce, func(ctx context.Context) error {
			if err := o.settle(ctx, m); err != nil {
				return err
			}
			m.agent.Close()
			return rest(ctx)
		}},
		{stagePause, pauser.Pause},
		{stageSave, func(ctx context.Context) error { return saver.Save(ctx, dir) }},
		{stageRelease, m.stop},
	} {
		if err := o.stage(ctx, s.stage, s.f); err != nil {
			return err
		}
	}
	return nil
}

// settle waits until the guest's init has started all it wants to start and everything is on the disks.
func (o *operation) settle(ctx context.Context, m *machine) error {
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	_, err := m.agent.Quiesce(ctx, &agentv1.QuiesceRequest{ForTemplate: true})
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return fault.New(fault.Timeout, "the guest of a template did not come to rest within %s", settleTimeout).WithHint("%s", o.consoleHint())
	}
	if err != nil {
		return fault.Wrap(fault.Unexpected, err, "the guest of a template did not come to rest").WithHint("%s", o.consoleHint())
	}
	return nil
}

// restTime is for what a guest does behind its last answer, and each of its clones would do again.
const restTime = 500 * time.Millisecond

func rest(ctx context.Context) error {
	select {
	case <-time.After(restTime):
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
