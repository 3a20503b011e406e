package engine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"banger/internal/capability"
	"banger/internal/fault"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
)

// Defaults of TemplateConfig.
const (
	DefaultTemplateBudget = 4 << 30
	DefaultTemplateAge    = 30 * 24 * time.Hour
	DefaultTemplateSettle = 10 * time.Second
)

// TemplateConfig says whether and how new VMs are restored from templates.
type TemplateConfig struct {
	Store *template.Store // nil: every VM boots

	// Sizes of a template's own disks. A VM with larger ones has them grown; one with a smaller one needs a
	// template of its own.
	DiskBytes, WorkDiskBytes int64

	Budget int64         // of all templates together, bytes; 0: DefaultTemplateBudget
	MaxAge time.Duration // without a use; 0: DefaultTemplateAge
	// Settle is how long a template that nobody waits for leaves the VM alone whose create asked for it; 0:
	// DefaultTemplateSettle.
	Settle time.Duration
}

func (c TemplateConfig) withDefaults() TemplateConfig {
	if c.Budget == 0 {
		c.Budget = DefaultTemplateBudget
	}
	if c.MaxAge == 0 {
		c.MaxAge = DefaultTemplateAge
	}
	if c.Settle == 0 {
		c.Settle = DefaultTemplateSettle
	}
	return c
}

// templateNote is the key in VM.Notes under which the row of a running VM remembers its template.
const templateNote = "template"

type madeOf struct {
	Key string `json:"key"`
}

// TemplateOf returns the key of the template whose memory a VM goes on from; "" when it booted.
func TemplateOf(v vm.VM) string {
	var note madeOf
	if raw, ok := v.Notes[templateNote]; !ok || json.Unmarshal(raw, &note) != nil {
		return ""
	}
	return note.Key
}

// noteTemplate makes the row remember which template the machine comes from, or that it comes from none.
func (o *operation) noteTemplate(from origin) error {
	if from.template == "" && o.v.Notes[templateNote] == nil {
		return nil
	}
	note, err := json.Marshal(madeOf{Key: from.template})
	if err != nil {
		return err
	}
	o.setNote(templateNote, note)
	return nil
}

// bringUpNew brings up a VM that has never run: from a template when there is one that fits, and otherwise by
// a boot, after which a template is made for the next one.
func (o *operation) bringUpNew(ctx context.Context, driver vmm.Driver, caps vmm.Caps) error {
	w, err := o.e.wish(ctx, o.v.Spec, driver, caps)
	if err != nil {
		return err
	}
	if w == nil || o.v.Spec.Cold {
		return o.bringUp(ctx, driver, caps, origin{})
	}
	t, err := o.e.c.Templates.Store.Get(w.key)
	switch {
	case err == nil:
		done, err := o.fromTemplate(ctx, driver, caps, t, w)
		if done || err != nil {
			return err
		}
	case fault.KindOf(err) != fault.NotFound:
		o.dropTemplate(w.key, err)
	}
	if err := o.bringUp(ctx, driver, caps, origin{}); err != nil {
		return err
	}
	o.e.wantTemplate(w)
	return nil
}

// fromTemplate tells whether the VM runs. When it does not and there is no error, the template was of no use
// and the VM is as it was before.
func (o *operation) fromTemplate(ctx context.Context, driver vmm.Driver, caps vmm.Caps, t template.Template, w *wish) (bool, error) {
	before := o.v
	from := origin{
		saved: t.Dir, template: t.Key, identity: true,
		growDisks: o.v.Spec.DiskBytes != w.spec.DiskBytes || o.v.Spec.WorkDiskBytes != w.spec.WorkDiskBytes,
	}
	o.failed = ""
	damage, err := o.bringUpVerified(ctx, driver, caps, t, from)
	if err == nil {
		if err := o.e.c.Templates.Store.Used(t.Key, o.e.c.Now()); err != nil {
			o.log.Warn("the use of a template could not be counted", "template", t.Key, "error", err)
		}
		return true, nil
	}
	// Whatever else fails would fail a boot as well.
	atFault := damage || o.failed == stageLoad || o.failed == stageIdentity
	vanished := fault.KindOf(err) == fault.NotFound
	if ctx.Err() != nil || !atFault && !vanished {
		return false, err
	}
	o.v.Notes, o.v.Handle = before.Notes, nil
	if err := o.removeDisks(); err != nil {
		return false, err
	}
	if atFault {
		o.e.maker.blame(t.Key)
		o.dropTemplate(t.Key, err)
	} else {
		o.log.Info("a template vanished while a VM was made of it", "template", t.Key, "error", err)
	}
	return false, nil
}

// bringUpVerified brings up a VM from a template, whose files are looked into meanwhile: the VM does not run before they are
// known to be whole, and ends when they are not. damaged tells that this is why it failed.
func (o *operation) bringUpVerified(ctx context.Context, driver vmm.Driver, caps vmm.Caps, t template.Template, from origin) (damaged bool, err error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	loading, verified := make(chan struct{}), make(chan struct{})
	var verdict error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		verdict = o.e.c.Templates.Store.Verify(ctx, t)
		close(verified)
		select { // what comes before is not the template's fault, and soon over
		case <-loading:
			if verdict != nil {
				cancel(verdict)
			}
		case <-ctx.Done():
		}
	}()
	from.loading = sync.OnceFunc(func() { close(loading) })
	from.verdict = func(ctx context.Context) error {
		select {
		case <-verified:
			return verdict
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	err = o.bringUp(ctx, driver, caps, from)
	cancel(nil)
	<-ended
	return err != nil && fault.KindOf(verdict) == fault.Precondition, err
}

// dropTemplate removes a template that cannot be used, and tells so: the next create finds none. VMs that run on
// it run on.
func (o *operation) dropTemplate(key string, why error) {
	o.sink.Notice(fmt.Sprintf("template %s cannot be used and is removed (%v): booting instead", key, why))
	o.log.Warn("template removed", "template", key, "error", why)
	if err := o.e.c.Templates.Store.Delete(key); err != nil && fault.KindOf(err) != fault.NotFound {
		o.log.Error("template not removed", "template", key, "error", err)
	}
}

// removeDisks removes the clones of a template's disks, which a boot makes anew from the image.
func (o *operation) removeDisks() error {
	for _, name := range ownDisks {
		err := os.Remove(filepath.Join(o.e.c.Paths.VM(o.v.ID), name))
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return fault.Wrap(fault.Precondition, err, "cannot remove a disk of VM %s", o.v.Spec.Name)
		}
	}
	return nil
}

// wish is the template that a VM would be restored from.
type wish struct {
	key    string
	shape  template.Shape
	spec   vm.Spec // of the template's own VM
	driver vmm.Driver
	caps   vmm.Caps
}

// wish returns the template that a VM of a spec wants; nil when there are none here, or for this VMM.
func (e *Engine) wish(ctx context.Context, spec vm.Spec, driver vmm.Driver, caps vmm.Caps) (*wish, error) {
	c := e.c.Templates
	// A template's memory is a file that VMs share, and QEMU would punch holes into it where one of them has free memory.
	if _, ok := driver.(vmm.Restorer); !ok || c.Store == nil || spec.Balloon {
		return nil, nil
	}
	spec.Name, spec.NAT, spec.AuthorizedKeys, spec.Ephemeral, spec.Cold = "template", false, nil, false, false
	spec.DiskRate, spec.NetRate = 0, 0 // who is restored from it has limits of its own
	if c.DiskBytes > 0 {
		spec.DiskBytes = min(spec.DiskBytes, c.DiskBytes)
	}
	if c.WorkDiskBytes > 0 {
		spec.WorkDiskBytes = min(spec.WorkDiskBytes, c.WorkDiskBytes)
	}
	w := &wish{spec: spec, driver: driver, caps: caps, shape: template.Shape{
		VMM: driver.Name(), VMMVersion: caps.Version + " " + caps.Build, Accelerator: caps.Accelerator,
		CPUs: spec.CPUs, MemoryBytes: spec.MemoryBytes,
	}}
	v := vm.VM{Spec: spec}
	for _, part := range e.c.Capabilities {
		s, ok := part.(capability.Shaper)
		if !ok || !part.Wants(spec) {
			continue
		}
		if err := s.Shape(ctx, v, caps, &w.shape); err != nil {
			return nil, err
		}
	}
	w.key = w.shape.Key()
	return w, nil
}

// Templates returns all templates, oldest first, those that cannot be used with a Problem.
func (e *Engine) Templates(context.Context) ([]template.Template, error) {
	if e.c.Templates.Store == nil {
		return nil, nil
	}
	return e.c.Templates.Store.List()
}

// DeleteTemplate removes the template whose key begins with prefix. VMs restored from it run on: what they
// have mapped stays on the disk until the last of them ends.
func (e *Engine) DeleteTemplate(_ context.Context, prefix string) error {
	if e.c.Templates.Store == nil {
		return errNoTemplates
	}
	key, err := e.c.Templates.Store.Find(prefix)
	if err != nil {
		return err
	}
	return e.c.Templates.Store.Delete(key)
}

var errNoTemplates = fault.New(fault.Precondition, "templates are switched off").WithHint("set templates = true in config.toml")

// evictTemplates removes templates that were not used for long or are too many. Those that a VM runs on stay:
// removing them would free nothing.
func (e *Engine) evictTemplates(ctx context.Context) ([]string, error) {
	c := e.c.Templates
	if c.Store == nil {
		return nil, nil
	}
	rows, err := e.c.Store.List(ctx)
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for _, v := range rows {
		if key := TemplateOf(v); key != "" && (v.State.HasProcess() || v.State == vm.Starting) {
			used[key] = true
		}
	}
	return c.Store.Evict(e.c.Now(), c.MaxAge, c.Budget, used)
}

// reconcileTemplates ends what a daemon that died had begun to make, and evicts. It runs before the sweep of TAP
// devices, which takes those of the makers.
func (e *Engine) reconcileTemplates(ctx context.Context) ([]string, error) {
	if e.c.Templates.Store == nil {
		return nil, nil
	}
	left, err := e.c.Templates.Store.Leftovers(func(l template.Leftover) error { return e.endMaker(ctx, l) })
	var told []string
	for _, l := range left {
		told = append(told, fmt.Sprintf("template %s was being made: taken back", l.Key))
	}
	evicted, errEvict := e.evictTemplates(ctx)
	for _, key := range evicted {
		told = append(told, fmt.Sprintf("template %s was not used for long, or there were too many: removed", key))
	}
	return told, errors.Join(err, errEvict)
}

// endMaker ends the process that works in the directory of a half-made template, if there is one.
func (e *Engine) endMaker(ctx context.Context, l template.Leftover) error {
	for _, d := range e.c.Drivers {
		running, err := d.Adopt(ctx, vmm.Machine{Name: "template", Dir: l.Dir}, vmm.Handle{})
		if fault.KindOf(err) == fault.NotFound {
			continue
		}
		if err != nil {
			return fmt.Errorf("find the machine of template %s: %w", l.Key, err)
		}
		return errors.Join(running.Stop(ctx), running.Close())
	}
	return nil
}
