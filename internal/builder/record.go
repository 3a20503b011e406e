package builder

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"

	"banger/internal/fault"
)

const recordSuffix = ".under-way"

// record notes that a build is under way, by the name that all it makes begins with. forget takes the note away.
func (b *Builder) record(id string) (forget func() error, err error) {
	path := filepath.Join(b.o.Paths.Builds(), id+recordSuffix)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot begin a build")
	}
	return func() error {
		if err := os.Remove(path); !errors.Is(err, os.ErrNotExist) {
			return err
		}
		return nil
	}, nil
}

// Reconcile takes back what builds of a daemon that died have left: their VMs and base images. Call it before the
// first build. It returns what it did and what it could not do, a line each.
func (b *Builder) Reconcile(ctx context.Context) (told []string) {
	found, err := filepath.Glob(filepath.Join(b.o.Paths.Builds(), "build-*"+recordSuffix))
	if err != nil {
		return []string{err.Error()}
	}
	for _, path := range found {
		id := strings.TrimSuffix(filepath.Base(path), recordSuffix)
		err := b.removeVM(ctx, id)
		if err == nil {
			err = b.o.Images.Delete(ctx, id+"-base", func(string) error { return nil })
		}
		if fault.KindOf(err) == fault.NotFound {
			err = nil
		}
		if err == nil {
			err = os.Remove(path)
		}
		if err != nil {
			told = append(told, "not taken back: "+id+": "+err.Error())
			continue
		}
		told = append(told, "took back what an interrupted build left: "+id)
	}
	return told
}
