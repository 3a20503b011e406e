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
	"strings"
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
// there are no groups.
func Programs() (*os.File, error) {
	own, err := Own()
	if own == "" || err != nil {
		return nil, err
	}
	dir := filepath.Join(Root, own, programs)
	if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return nil, err
	}
	return os.Open(dir)
}

// Freeze stops all programs but those of this process's own group, the first process too, and returns the frozen groups
// when all stand still. Without control groups there is nothing to freeze.
func Freeze(ctx context.Context) ([]string, error) {
	own, err := Own()
	if own == "" || err != nil {
		return nil, err
	}
	return freeze(ctx, Root, own)
}

func freeze(ctx context.Context, root, own string) (frozen []string, err error) {
	groups, err := beside(root, own)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, Thaw(frozen))
			frozen = nil
		}
	}()
	for _, group := range groups {
		err := os.WriteFile(filepath.Join(group, "cgroup.freeze"), []byte("1"), 0)
		if errors.Is(err, fs.ErrNotExist) { // it has ended
			continue
		}
		if err != nil {
			return frozen, fmt.Errorf("freeze %s: %w", group, err)
		}
		frozen = append(frozen, group)
	}
	ctx, cancel := context.WithTimeout(ctx, freezeWait)
	defer cancel()
	for _, group := range frozen {
		if err := awaitFrozen(ctx, group); err != nil {
			return frozen, fmt.Errorf("freeze %s: %w", group, err)
		}
	}
	return frozen, nil
}

// beside lists the groups that together hold everybody but the own one: those below it, and its siblings and those of
// each one it is in.
func beside(root, own string) ([]string, error) {
	var groups []string
	at := root
	for _, next := range append(strings.Split(strings.Trim(own, "/"), "/"), "") {
		entries, err := os.ReadDir(at)
		if errors.Is(err, fs.ErrNotExist) {
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
		if errors.Is(err, fs.ErrNotExist) || strings.Contains(string(events), "frozen 1") {
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

// Thaw lets frozen groups run on.
func Thaw(groups []string) error {
	var errs []error
	for _, group := range groups {
		err := os.WriteFile(filepath.Join(group, "cgroup.freeze"), []byte("0"), 0)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, fmt.Errorf("thaw %s: %w", group, err))
		}
	}
	return errors.Join(errs...)
}

// Own returns the group of this process below Root, "/" for Root itself; "" when there are none.
func Own() (string, error) {
	b, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return "", err
	}
	return own(string(b)), nil
}

// own finds the group in /proc/self/cgroup, whose line of version 2 is "0::/system.slice".
func own(text string) string {
	for line := range strings.Lines(text) {
		if path, ok := strings.CutPrefix(strings.TrimSpace(line), "0::"); ok {
			return path
		}
	}
	return ""
}
