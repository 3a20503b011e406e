package image

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"

	"banger/internal/system"
)

const strayWait = 5000 // milliseconds for one killed process to be gone

// Sweep removes what images that were being made when their daemon died have left: half-written ones, and the programs and
// temporary files of mmdebstrap. Those at work are not touched.
func (s *Store) Sweep(ctx context.Context) error {
	err := s.shelf.Sweep()
	mmdebstrap, missing := system.Find("mmdebstrap", "mmdebstrap")
	if missing != nil {
		return err // then there are none of its files
	}
	return errors.Join(err, sweepScratch(ctx, mmdebstrap))
}

// endStrays kills the programs that a dead build has left at work in dir, known by their environment. Whoever made a user
// namespace may do so with those in it as well.
func endStrays(dir string) {
	found, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		return // the pattern is right
	}
	mark := []byte("TMPDIR=" + dir + "\x00")
	for _, path := range found {
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil || pid == os.Getpid() {
			continue
		}
		endMarked(pid, path, mark)
	}
}

// endMarked holds on to the process before it looks at it: a number may come to mean another one.
func endMarked(pid int, environ string, mark []byte) {
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return // it is gone
	}
	defer func() { _ = unix.Close(fd) }()
	if text, err := os.ReadFile(environ); err != nil || !bytes.Contains(text, mark) {
		return
	}
	if unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil {
		_, _ = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, strayWait) // what is still there is told by the removal
	}
}
