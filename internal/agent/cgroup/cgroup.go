// Package cgroup stops and lets go the programs of a guest by their control groups, version 2
// (Documentation/admin-guide/cgroup-v2.rst).
package cgroup

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"
)

// Root is where the control groups are mounted.
const Root = "/sys/fs/cgroup"

const (
	freezeWait = 5 * time.Second
	freezePoll = 5 * time.Millisecond
)

// programs is the group, below the agent's own, of what it starts for others.
const programs = "programs"

// Programs opens the group in which programs are started, so that they can stand still without the agent; nil when
// there are no groups that users see. The group stays for as long as the file is open.
func Programs() (*os.File, error) {
	own, err := Own()
	if own == "" || err != nil || !mountedOn(Root) {
		return nil, err
	}
	if own != "/"+aside {
		tidy() // programs that were started before may have ended since
	}
	return keep(filepath.Join(Root, own, programs))
}

// Freeze stops all programs but those of this process's own group and of the agent's, the first process too, and returns
// when all stand still. The guard, a process of the agent's when not 0, is taken to its group. Each group is noted, by its
// path in the hierarchy, before it is told to. thaw lets them run on, and may be called again when it could not; groups that
// stood still before are left as they were. A first process that makes no groups itself, and who is beside it,
// are gathered in one meanwhile; one that does has to have made its own. A kernel without control groups is
// errors.ErrUnsupported. Nothing may be started in a frozen group: the starter's thread waits for the program to take its
// first step, and no other of its goroutines may get a turn meanwhile.
func Freeze(ctx context.Context, makesGroups bool, guard int, note func(group string) error) (thaw func() error, err error) {
	h, err := open()
	if err != nil {
		return nil, err
	}
	if makesGroups {
		waiting, cancel := context.WithTimeout(ctx, freezeWait)
		defer cancel()
		moves, err := lockMoves(waiting, Root)
		if err != nil {
			return nil, errors.Join(err, h.Close())
		}
		defer moves.Close()
	}
	for range asideMost {
		if makesGroups {
			err = stepAside()
		}
		var own string
		if err == nil {
			own, err = Own()
		}
		if err == nil {
			err = h.take(guard, own)
		}
		var letGo func() error
		if err == nil {
			letGo, err = h.freezeBeside(ctx, own, makesGroups, note)
		}
		if err != nil {
			return nil, errors.Join(err, h.Close())
		}
		still, err := stillBeside(own, guard, makesGroups)
		if still && err == nil {
			return func() error {
				if err := letGo(); err != nil {
					return err // where it is mounted is needed for another try
				}
				return h.Close()
			}, nil
		}
		if err := errors.Join(err, letGo()); err != nil {
			return nil, errors.Join(err, h.Close())
		}
	}
	return nil, errors.Join(errors.New("the first process takes the agent along again and again"), h.Close())
}

// asideMost is how often the first process is left: when it starts it takes along whom it found in the root of all.
const asideMost = 5

// freezeBeside stops all but those in the group own.
func (h *hierarchy) freezeBeside(ctx context.Context, own string, makesGroups bool, note func(group string) error) (thaw func() error, err error) {
	var frozen []string
	if !makesGroups {
		err = h.gather(ctx, own, "/proc", note)
	}
	if err == nil {
		frozen, err = freeze(ctx, h.root, own, note)
	}
	thaw = func() error { return errors.Join(thawAll(frozen), h.disband()) }
	if err != nil {
		return nil, errors.Join(err, thaw())
	}
	return thaw, nil
}

// Thaw lets groups run on that were noted by somebody who died.
func Thaw(groups []string) error {
	h, err := open()
	if err != nil {
		return err
	}
	var paths []string
	for _, group := range groups {
		paths = append(paths, filepath.Join(h.root, group))
		if filepath.Base(group) == gathered {
			h.from = filepath.Join(h.root, filepath.Dir(group))
		}
	}
	return errors.Join(thawAll(paths), h.disband(), h.Close())
}

func freeze(ctx context.Context, root, own string, note func(group string) error) (frozen []string, err error) {
	ctx, cancel := context.WithTimeout(ctx, freezeWait)
	defer cancel()
	defer func() {
		if err != nil {
			err = errors.Join(err, thawAll(frozen))
			frozen = nil
		}
	}()
	// Until all stand still, somebody may make another group.
	for seen := map[string]bool{}; ; {
		groups, err := beside(root, own)
		if err != nil {
			return frozen, err
		}
		groups = slices.DeleteFunc(groups, func(group string) bool { return seen[group] })
		if len(groups) == 0 {
			return frozen, nil
		}
		if err := ctx.Err(); err != nil {
			return frozen, err
		}
		for _, group := range groups {
			seen[group] = true
			err := freezeOne(group, &frozen, func() error { return note(strings.TrimPrefix(group, root)) })
			if err != nil {
				return frozen, fmt.Errorf("freeze %s: %w", group, err)
			}
		}
		for _, group := range groups {
			if err := awaitFrozen(ctx, group); err != nil {
				return frozen, fmt.Errorf("freeze %s: %w", group, err)
			}
		}
	}
}

// freezeOne tells a group to stand still, and adds it to those that are to be let go; it is noted before.
func freezeOne(group string, frozen *[]string, note func() error) error {
	file := filepath.Join(group, "cgroup.freeze")
	before, err := os.ReadFile(file)
	switch {
	case ended(err):
		return nil
	case err != nil:
		return err
	case strings.TrimSpace(string(before)) == "1": // by the user's own word
		return nil
	}
	if err := note(); err != nil {
		return fmt.Errorf("note it: %w", err)
	}
	if err := os.WriteFile(file, []byte("1"), 0); err != nil {
		if ended(err) {
			return nil
		}
		return err
	}
	*frozen = append(*frozen, group)
	return nil
}

// ended tells whether a file could not be used because its group is gone: before it was opened, or since.
func ended(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ENODEV)
}

// beside lists the groups that together hold everybody but the own one: those below it, and its siblings and those of
// each one it is in.
func beside(root, own string) ([]string, error) {
	var groups []string
	at := root
	for _, next := range append(strings.FieldsFunc(own, func(r rune) bool { return r == '/' }), "") {
		entries, err := os.ReadDir(at)
		if ended(err) {
			return groups, nil
		}
		if err != nil {
			return nil, err
		}
		for _, e := range entries {
			if e.IsDir() && e.Name() != next {
				groups = append(groups, filepath.Join(at, e.Name()))
			}
		}
		at = filepath.Join(at, next)
	}
	return groups, nil
}

func awaitFrozen(ctx context.Context, group string) error {
	for {
		events, err := os.ReadFile(filepath.Join(group, "cgroup.events"))
		if ended(err) || strings.Contains(string(events), "frozen 1") {
			return nil
		}
		if err != nil {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(freezePoll):
		}
	}
}

// thawAll lets frozen groups run on.
func thawAll(groups []string) error {
	var errs []error
	for _, group := range groups {
		err := os.WriteFile(filepath.Join(group, "cgroup.freeze"), []byte("0"), 0)
		if err != nil && !ended(err) {
			errs = append(errs, fmt.Errorf("thaw %s: %w", group, err))
		}
	}
	return errors.Join(errs...)
}

// Own returns the group of this process below Root, "/" for Root itself; "" when there are none.
func Own() (string, error) { return of("self") }

// of returns the group of a process, as it is named in /proc.
func of(process string) (string, error) {
	b, err := os.ReadFile(filepath.Join("/proc", process, "cgroup"))
	if err != nil {
		return "", err
	}
	return groupIn(string(b)), nil
}

// groupIn finds the group in a process's /proc/PID/cgroup, whose line of version 2 is "0::/system.slice".
func groupIn(text string) string {
	for line := range strings.Lines(text) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return path
		}
	}
	return ""
}
