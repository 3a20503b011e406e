package kernel

import (
	"context"

	"banger/internal/fault"
)

// SetDefault makes a kernel the one that VMs get which name none.
func (s *Store) SetDefault(ctx context.Context, name string) (Kernel, error) {
	k, err := s.Get(ctx, name)
	if err != nil {
		return k, err
	}
	return k, s.shelf.SetDefault(k.Name)
}

// Delete removes a kernel, also a damaged one. used tells why it cannot go, or nil; it is asked before, and again
// while the kernel is out of the way. The default kernel is not deleted.
func (s *Store) Delete(_ context.Context, name string, used func(name string) error) error {
	def, err := s.shelf.Default()
	switch {
	case name == "":
		return fault.New(fault.Usage, "the request names no kernel")
	case err != nil:
		return err
	case def == name:
		return fault.New(fault.Conflict, "kernel %s is the default kernel", name).
			WithHint("make another one the default first: banger kernel default NAME")
	}
	return s.shelf.Delete(name, func() error { return used(name) })
}

// Reconcile looks after the default kernel, and returns what it did and what is wrong, a line each.
func (s *Store) Reconcile() []string { return s.shelf.Reconcile(s.shelf.Present) }
