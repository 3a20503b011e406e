package engine

import (
	"context"
	"errors"
	"fmt"
	"os"

	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/vm"
)

// maxChildNames bounds the search for free names.
const maxChildNames = 10000

// beginChild makes the caller the owner of a VM that is made of another one: what it wished, and what its
// capabilities know of its disks. It has no row yet.
func (e *Engine) beginChild(ctx context.Context, source *operation, name, verb string) (*child, error) {
	v := vm.VM{ID: vm.NewID(), Spec: source.v.Spec, State: vm.Stopped, CreatedAt: e.c.Now().UTC(), Driver: source.v.Driver, Notes: source.inherited()}
	v.Spec.Name, v.Spec.Ephemeral, v.Spec.Cold = name, false, false
	v.Spec.Ports = nil // a port of the host leads to one VM
	if e.c.MAC != nil {
		v.MAC = e.c.MAC(v.ID)
	}
	if err := v.Spec.Validate(e.c.Limits); err != nil {
		return nil, err
	}
	ctx, o, err := e.beginNew(ctx, v, verb, nil)
	if err != nil {
		return nil, err
	}
	return &child{operation: o, ctx: ctx}, nil
}

// insert writes the child's row: one that is being created, until it is whole.
func (c *child) insert(ctx context.Context) error {
	c.e.locks.interruptible(c.v.ID, c.cancel)
	if _, err := c.move(vm.AskStart); err != nil {
		return err
	}
	c.v.Creating = true
	return c.stage(ctx, stageRecord, func(ctx context.Context) error {
		v, err := c.e.c.Store.Insert(ctx, c.v, c.e.c.Allocate, c.pending...)
		if err != nil {
			return err
		}
		c.v, c.pending, c.recorded = v, nil, true
		return nil
	})
}

// erased removes a child that was not to be, in whatever state it is.
func (c *child) erased(ctx context.Context) error {
	switch {
	case !c.recorded: // its row was not written
		return nil
	case c.v.Creating:
		return c.eraseFailed(ctx)
	}
	return c.delete(ctx, true)
}

// childNames returns names for VMs that are made of another one: wished, wished-2, wished-3..., or the
// first free ones of source-how-1, source-how-2...
func (e *Engine) childNames(ctx context.Context, source, how, wished string, count int) ([]string, error) {
	rows, err := e.c.Store.List(ctx)
	if err != nil {
		return nil, err
	}
	taken := map[string]bool{}
	for _, v := range rows {
		taken[v.Spec.Name] = true
	}
	var names []string
	for i := 1; len(names) < count && i <= maxChildNames; i++ {
		name := fmt.Sprintf("%s-%s-%d", source, how, i)
		switch {
		case wished != "" && i == 1:
			name = wished
		case wished != "":
			name = fmt.Sprintf("%s-%d", wished, i)
		case taken[name]:
			continue
		}
		if taken[name] {
			return nil, fault.New(fault.Conflict, "a VM named %s exists", name).WithHint("choose another name, or delete it: banger vm delete %s", name)
		}
		names = append(names, name)
	}
	if len(names) < count {
		return nil, fault.New(fault.Conflict, "no names are left for VMs made of %s", source).WithHint("give one")
	}
	return names, nil
}

// roomForCopies finds too little space for copies of the VM's disks and more bytes.
func (o *operation) roomForCopies(count int, more int64) error {
	for _, name := range ownDisks {
		bytes, err := disk.AllocatedBytes(o.file(name))
		if errors.Is(err, os.ErrNotExist) { // not every VM has each
			continue
		}
		if err != nil {
			return err
		}
		more += int64(count) * bytes
	}
	return disk.RequireFree(o.e.c.Paths.VMs(), more, "copies of VM "+o.v.Spec.Name)
}

// copyDisks copies the disks of a VM that stands still to another one, which has none.
func copyDisks(ctx context.Context, to, from *operation) error {
	if err := to.makeDir(); err != nil {
		return err
	}
	return copyOwnDisks(ctx, to.e.c.Paths.VM(to.v.ID), from.e.c.Paths.VM(from.v.ID))
}

// makeDir makes the VM's own directory.
func (o *operation) makeDir() error {
	if err := os.MkdirAll(o.e.c.Paths.VM(o.v.ID), 0o700); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot make the directory of VM %s", o.v.Spec.Name)
	}
	return nil
}
