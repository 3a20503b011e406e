package system

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// Nice makes all threads of a process give way to others: 0 is ordinary, 19 the most (setpriority(2)). Threads
// that they start later do so too.
func Nice(pid, level int) error {
	tasks, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", pid))
	if err != nil {
		return fmt.Errorf("slow process %d down: %w", pid, err)
	}
	for _, t := range tasks {
		tid, err := strconv.Atoi(t.Name())
		if err != nil {
			continue
		}
		if err := unix.Setpriority(unix.PRIO_PROCESS, tid, level); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("slow process %d down: %w", pid, err)
		}
	}
	return nil
}

// DialUnixIn connects to the Unix socket name in the directory dir, however long dir is: the
// address goes by /proc/self/fd, because the kernel takes 107 bytes only (unix(7)).
func DialUnixIn(ctx context.Context, dir, name string) (net.Conn, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("connect to %s: open %s: %w", name, dir, err)
	}
	defer unix.Close(fd)
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", fmt.Sprintf("/proc/self/fd/%d/%s", fd, name))
	if err != nil {
		var op *net.OpError // its text would show the /proc path, which means nothing to a reader
		if errors.As(err, &op) {
			err = op.Err
		}
		return nil, fmt.Errorf("connect to %s: %w", filepath.Join(dir, name), err)
	}
	return conn, nil
}
