package adopt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/agent/run"
)

const (
	sshdPIDFile = "/run/sshd.pid"
	sshdWait    = 10 * time.Second
	sshdPoll    = time.Millisecond
)

// restart is an sshd on its way to its new keys.
type restart struct {
	pid    int
	before os.FileInfo // its PID file as it was
}

// restartSSHD makes the running sshd read its keys again; nil when there is none. At SIGHUP it stops listening, executes
// itself, and listens again when it has read them. That it refuses connections until then is no other than at a boot. One
// that is only being started, in a guest that boots, may have read the old keys and has no ear for SIGHUP yet: it is
// killed, and systemd starts it again.
func (g *Guest) restartSSHD() (*restart, error) {
	r, err := restartSSHD()
	g.sshdMu.Lock()
	defer g.sshdMu.Unlock()
	g.sshd = r
	return r, err
}

func restartSSHD() (*restart, error) {
	pid := daemonPID(sshdPIDFile, "sshd")
	if pid == 0 {
		return nil, signal(sshdGroup, "sshd", syscall.SIGKILL)
	}
	before, err := os.Stat(sshdPIDFile)
	if err != nil {
		return nil, fmt.Errorf("restart sshd: %w", err)
	}
	if err := syscall.Kill(pid, syscall.SIGHUP); err != nil {
		return nil, fmt.Errorf("restart sshd: %w", err)
	}
	return &restart{pid, before}, nil
}

// wait returns when nobody is answered with the old keys any more.
func (r *restart) wait(ctx context.Context) error {
	if r == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, sshdWait)
	defer cancel()
	for !hasRestarted(r.pid, r.before) {
		select {
		case <-ctx.Done():
			return fmt.Errorf("sshd still has the keys it had before: %w", ctx.Err())
		case <-time.After(sshdPoll):
		}
	}
	return nil
}

// hasRestarted tells whether the sshd of that pid has executed itself. It removes its PID file before and writes
// it again when it listens; while it listens its command line, which is a title, says so.
func hasRestarted(pid int, before os.FileInfo) bool {
	if now, err := os.Stat(sshdPIDFile); err == nil {
		return !os.SameFile(before, now)
	}
	title, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err != nil || !strings.Contains(string(title), "[listener]") // no such process: it listens no more
}

// daemonPID returns the pid in the file when it is a program of that name, or 0.
func daemonPID(file, name string) int {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0
	}
	comm, err := os.ReadFile(fmt.Sprintf("/proc/%d/comm", pid))
	if err != nil || strings.TrimSpace(string(comm)) != name {
		return 0
	}
	return pid
}

var (
	sshdGroup     = groupOf(sshdService)
	journaldGroup = groupOf(journaldService)
)

const (
	hostnamedGroup = "/sys/fs/cgroup/system.slice/systemd-hostnamed.service/cgroup.procs"
	hostnamedName  = "systemd-hostnam"
	journaldSocket = "/run/systemd/journal/socket"
	journaldName   = "systemd-journal" // the kernel cuts names at 15 bytes
)

// renewJournal makes the journal that of the new machine. journald keeps the machine id it found when it
// started: it is ended, and systemd starts it again (its sockets and its clients' streams are kept meanwhile).
func (g *Guest) renewJournal(ctx context.Context, old, now string) error {
	if !g.Systemd() || old == now {
		return nil
	}
	if err := restartJournald(ctx); err != nil {
		return err
	}
	// It answers for a while before it leaves, and comes when it is asked again.
	return signal(hostnamedGroup, hostnamedName, syscall.SIGTERM)
}

// restartJournald ends it, which is quick; or, in a guest that boots, asks systemd to restart it: the service that
// moves the journal to the disk fails when there is no journald at that moment, and only systemd has one wait for the
// other.
func restartJournald(ctx context.Context) error {
	if flushed() {
		return signal(journaldGroup, journaldName, syscall.SIGTERM)
	}
	if _, err := run.Output(ctx, stopWait, systemctl, "--no-block", "restart", journaldService); err == nil {
		return nil
	}
	return signal(journaldGroup, journaldName, syscall.SIGTERM) // systemd does not take orders yet
}

// flushed tells whether the service that moves the journal to the disk is done: systemd has a link for each that it has
// started, and a group as long as it has processes.
func flushed() bool {
	if _, err := os.Lstat("/run/systemd/units/invocation:systemd-journal-flush.service"); err != nil {
		return false
	}
	processes, err := os.ReadFile("/sys/fs/cgroup/system.slice/systemd-journal-flush.service/cgroup.procs")
	return err != nil || len(processes) == 0
}

// signal sends one to the daemon of that name, when it runs.
func signal(group, name string, s syscall.Signal) error {
	pid := daemonPID(group, name)
	if pid == 0 {
		return nil
	}
	if err := syscall.Kill(pid, s); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("send %s to %s: %w", unix.SignalName(s), name, err)
	}
	return nil
}

// removeJournal removes what the machine of that id wrote.
func removeJournal(root, id string) error {
	if id == "" {
		return nil
	}
	for _, dir := range []string{"run/log/journal", "var/log/journal"} {
		if err := os.RemoveAll(filepath.Join(root, dir, id)); err != nil {
			return fmt.Errorf("remove the template's journal: %w", err)
		}
	}
	return nil
}

// tellJournal writes a line by journald's native protocol, which also starts it when it does not run. systemd
// holds the socket.
func tellJournal(message string) error {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	text := "PRIORITY=6\nSYSLOG_IDENTIFIER=banger-agent\nMESSAGE=" + message + "\n"
	err = unix.Sendto(fd, []byte(text), 0, &unix.SockaddrUnix{Name: journaldSocket})
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, unix.EAGAIN) {
		return nil // an image without journald, or one that is drowned in messages
	}
	return err
}
