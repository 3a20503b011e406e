package engine

import (
	"context"
	"errors"

	"banger/internal/fault"
	"banger/internal/progress"
	"banger/internal/vm"
)

// Clone makes another VM of a stopped one: with copies of its disks, stopped. It gets an identity of its own when
// it starts. When it fails or is cancelled nothing is left. An empty name is replaced by a free one.
func (e *Engine) Clone(ctx context.Context, ref, name string, sink progress.Sink) (made vm.VM, err error) {
	_, err = e.verb(ctx, ref, "clone", sink, func(ctx context.Context, o *operation) error {
		made, err = o.clone(ctx, name)
		return err
	})
	return made, err
}

func (o *operation) clone(ctx context.Context, name string) (made vm.VM, err error) {
	if err := o.clonable(); err != nil {
		return made, err
	}
	if err := o.roomForCopies(1, 0); err != nil {
		return made, err
	}
	names, err := o.e.childNames(ctx, o.v.Spec.Name, "clone", name, 1)
	if err != nil {
		return made, err
	}
	c, err := o.e.beginChild(ctx, o, names[0], "clone")
	if err != nil {
		return made, err
	}
	defer c.end()
	c.v.Spec.Ephemeral, c.sink = o.v.Spec.Ephemeral, o.sink
	err = c.insert(c.ctx)
	if err == nil {
		err = c.stage(c.ctx, stageCopy, func(ctx context.Context) error { return copyDisks(ctx, c.operation, o) })
	}
	if err == nil {
		err = c.settle()
	}
	if err != nil {
		return made, errors.Join(err, c.erased(ctx))
	}
	return c.v, nil
}

// settle makes a child that is whole a stopped VM.
func (c *child) settle() error {
	before := c.v
	_, err1 := c.move(vm.AskStop)
	_, err2 := c.move(vm.TakenDown)
	c.v.Creating = false
	err := errors.Join(err1, err2)
	if err == nil {
		err = c.save(c.ctx)
	}
	if err != nil {
		c.v = before
	}
	return err
}

// clonable says why the disks of a VM cannot be copied.
func (o *operation) clonable() error {
	name := o.v.Spec.Name
	refusal := fault.New(fault.Conflict, "VM %s is not cloned: it is %s", name, o.v.State)
	switch o.v.State {
	case vm.Stopped, vm.Failed:
		return nil
	case vm.Running:
		return refusal.WithHint("make a VM of it as it runs: banger vm fork %s; or stop it first", name)
	case vm.Suspended:
		return refusal.WithHint("resume it, then make a VM of it as it runs: banger vm resume %s && banger vm fork %s", name, name)
	}
	return refusal.WithHint("wait until that is done, then try again")
}
