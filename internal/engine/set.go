package engine

import (
	"context"
	"errors"
	"fmt"
	"reflect"

	"banger/internal/capability"
	"banger/internal/vm"
)

// stageApply is what capabilities do with a changed spec of a VM that runs.
const stageApply = "apply"

// Set changes a VM's spec, and of one that runs what its capabilities can change at once. When that fails all is
// as before. What does not change anything succeeds and does nothing.
func (e *Engine) Set(ctx context.Context, ref string, change func(*vm.Spec)) (vm.VM, error) {
	return e.verb(ctx, ref, "set", nil, func(ctx context.Context, o *operation) error {
		before := o.v.Spec
		change(&o.v.Spec)
		if reflect.DeepEqual(before, o.v.Spec) {
			return nil
		}
		err := o.v.Spec.Validate(e.c.Limits)
		if err == nil {
			err = o.apply(ctx)
		}
		if err == nil {
			err = o.stage(ctx, stageRecord, func(ctx context.Context) error { return o.save(ctx) })
		}
		if err == nil {
			return nil
		}
		o.v.Spec = before
		back, cancel := o.detached(ctx)
		defer cancel()
		return errors.Join(err, o.apply(back))
	})
}

// apply lets the capabilities of a VM that runs do what its spec says now.
func (o *operation) apply(ctx context.Context) error {
	if !o.v.State.HasProcess() {
		return nil
	}
	return o.stage(ctx, stageApply, func(ctx context.Context) error {
		for _, c := range o.wanted() {
			u, ok := c.(capability.Updater)
			if !ok {
				continue
			}
			if err := u.Update(ctx, o.v); err != nil {
				return fmt.Errorf("change %s of VM %s: %w", c.Name(), o.v.Spec.Name, err)
			}
		}
		return nil
	})
}
