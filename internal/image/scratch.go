package image

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"banger/internal/fault"
	"banger/internal/system"
)

const scratchPrefix = "banger-bootstrap-"

// scratch is a directory for mmdebstrap's temporary files. It lies where other users can look it up, as
// in a user namespace mmdebstrap works as one of them. Its maker holds a lock on it, so that the
// next build can tell one that was left behind.
type scratch struct {
	dir        string
	lock       *os.File
	mmdebstrap string
}

// sweepScratch removes what dead builds left.
func sweepScratch(ctx context.Context, mmdebstrap string) error {
	found, err := filepath.Glob(filepath.Join(os.TempDir(), scratchPrefix+"*"))
	if err != nil {
		return err
	}
	for _, dir := range found {
		old := &scratch{dir: dir, mmdebstrap: mmdebstrap}
		if !old.ours() || old.take() != nil {
			continue // another user's, or in use
		}
		endStrays(dir)
		if err := old.remove(ctx); err != nil {
			return err
		}
	}
	return nil
}

// newScratch removes what dead builds left and makes a new directory.
func newScratch(ctx context.Context, mmdebstrap string) (*scratch, error) {
	if err := sweepScratch(ctx, mmdebstrap); err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", scratchPrefix)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot make a temporary directory")
	}
	s := &scratch{dir: dir, mmdebstrap: mmdebstrap}
	if err := errors.Join(os.Chmod(dir, 0o711), s.take()); err != nil {
		return nil, errors.Join(err, os.Remove(dir))
	}
	if os.Geteuid() != 0 { // the namespace's user must be able to write here
		if err := os.Chmod(dir, os.ModeSticky|0o777); err != nil {
			return nil, errors.Join(err, os.Remove(dir))
		}
	}
	return s, nil
}

func (s *scratch) ours() bool {
	info, err := os.Lstat(s.dir)
	if err != nil || !info.IsDir() {
		return false
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	return ok && int(st.Uid) == os.Geteuid()
}

func (s *scratch) take() error {
	f, err := os.Open(s.dir)
	if err != nil {
		return err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		return errors.Join(err, f.Close())
	}
	s.lock = f
	return nil
}

// remove deletes the directory, whoever owns the files in it. It refuses while something is mounted
// below: that would be deleted as well.
func (s *scratch) remove(ctx context.Context) error {
	defer func() { _ = s.lock.Close() }()
	ctx = context.WithoutCancel(ctx) // also when the build was given up
	mounted, err := mountedBelow(s.dir)
	if err != nil {
		return err
	}
	if mounted != "" {
		return fault.New(fault.Precondition, "%s is still mounted", mounted).
			WithHint("unmount it and remove %s", s.dir)
	}
	if err := os.RemoveAll(s.dir); err == nil || os.Geteuid() == 0 {
		return err
	}
	// The rest belongs to users of the namespace.
	_, helperErr := system.Run(ctx, system.Command{Path: s.mmdebstrap, Args: []string{"--unshare-helper", "rm", "-rf", "--one-file-system", s.dir}})
	if err := os.RemoveAll(s.dir); err != nil {
		return fault.Wrap(fault.Precondition, errors.Join(err, helperErr), "cannot remove the temporary directory of the build").WithHint("remove %s", s.dir)
	}
	return nil
}

// mountedBelow returns a mount point below dir, or "".
func mountedBelow(dir string) (string, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("cannot tell what is mounted: %w", err)
	}
	defer func() { _ = f.Close() }()
	lines := bufio.NewScanner(f)
	for lines.Scan() {
		if fields := strings.Fields(lines.Text()); len(fields) > 4 && strings.HasPrefix(fields[4], dir+"/") {
			return fields[4], nil
		}
	}
	return "", lines.Err()
}
