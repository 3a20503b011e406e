package adopt

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
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
		return fmt.Errorf("end %s: %w", name, err)
	}
	return nil
}

var (
	sshdGroup     = groupOf(sshdService)
	journaldGroup = groupOf(journaldService)
)

// heldShell is the name of the process that is to become a service.
const heldShell = "sh"

// A service that is started ahead stands still as a shell that has read nothing yet. What systemd does to start it, two
// thirds of the work, is done for all clones; in a clone SIGCONT is the first thing that it hears of.
const (
	journaldService = "systemd-journald.service"
	sshdService     = "ssh.service"

	aheadDropIn  = "/run/systemd/system/%s.d/banger-template.conf"
	aheadCommand = "[Service]\nExecStart=\nExecStart=/bin/sh -c 'kill -STOP $$$$; exec \"$$0\" \"$$@\"' %s\n"
)

// startAhead removes the journal, and starts journald and sshd in a template up to where they would learn which machine
// this is.
func startAhead(ctx context.Context) error {
	var ahead []string
	// First: who has something to say while journald is stopped starts it.
	for _, service := range []string{journaldService, sshdService} {
		held, err := prepareAhead(ctx, service)
		if err != nil {
			return err
		}
		if held {
			ahead = append(ahead, service)
		}
	}
	if err := systemd(ctx, "daemon-reload"); err != nil {
		return err
	}
	if slices.Contains(ahead, sshdService) { // while somebody still hears what it has to say of that
		if err := systemd(ctx, "stop", sshdService); err != nil {
			return err
		}
	}
	if err := stopJournal(ctx); err != nil {
		return err
	}
	for _, service := range ahead {
		if err := systemd(ctx, "start", "--no-block", service); err != nil {
			return err
		}
	}
	for _, service := range ahead {
		if err := awaitStopped(ctx, groupOf(service), heldShell); err != nil {
			return fmt.Errorf("start %s for the clones: %w", service, err)
		}
		if err := removeDropIn(fmt.Sprintf(aheadDropIn, service)); err != nil {
			return err
		}
	}
	return systemd(ctx, "daemon-reload")
}

// goAhead lets the services that were started ahead go on, once they are let go.
func goAhead() error {
	return errors.Join(signal(journaldGroup, heldShell, syscall.SIGCONT), signal(sshdGroup, heldShell, syscall.SIGCONT))
}

// stopJournal stops journald and removes its journal. Its sockets start it when there is something to say.
func stopJournal(ctx context.Context) error {
	if err := systemd(ctx, "stop", journaldService); err != nil {
		return err
	}
	id, err := machineID()
	if err != nil {
		return err
	}
	return removeJournal("/", id)
}

func systemd(ctx context.Context, command ...string) error {
	if _, err := run.Output(ctx, stopWait, append([]string{systemctl}, command...)...); err != nil {
		return fmt.Errorf("systemctl %s: %w", strings.Join(command, " "), err)
	}
	return nil
}

// prepareAhead has systemd start a service as a shell that stands still, from its next start on, and tells whether it
// will: the service may not run, there may be no shell, and it may be more than plain words.
func prepareAhead(ctx context.Context, service string) (bool, error) {
	command := commandOf(ctx, service)
	if _, err := os.Stat(groupOf(service)); err != nil || command == "" || unix.Access("/bin/sh", unix.X_OK) != nil {
		return false, nil
	}
	name := fmt.Sprintf(aheadDropIn, service)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return false, err
	}
	return true, os.WriteFile(name, fmt.Appendf(nil, aheadCommand, command), 0o644)
}

// removeDropIn removes the file, and its directory unless somebody else has something there.
func removeDropIn(name string) error {
	if err := os.Remove(name); err != nil {
		return err
	}
	err := os.Remove(filepath.Dir(name))
	if errors.Is(err, unix.ENOTEMPTY) {
		return nil
	}
	return err
}

// commandOf is what a service runs; "" when that is not plain words and variables.
func commandOf(ctx context.Context, service string) string {
	out, err := run.Output(ctx, stopWait, systemctl, "show", "--property=ExecStart", service)
	if err != nil {
		return ""
	}
	return plainCommand(string(out))
}

// plainCommand finds it in what systemctl shows: "ExecStart={ path=/a ; argv[]=/a -b $C ; ...}".
func plainCommand(shown string) string {
	_, after, _ := strings.Cut(shown, " argv[]=")
	command, rest, found := strings.Cut(after, " ;")
	if !found || !strings.HasPrefix(command, "/") || strings.ContainsAny(command, "'\"\\%\n") || strings.Contains(rest, "argv[]=") {
		return ""
	}
	return command
}

func groupOf(service string) string {
	return "/sys/fs/cgroup/system.slice/" + service + "/cgroup.procs"
}

// awaitStopped waits until a process of that name in the group is stopped by a signal.
func awaitStopped(ctx context.Context, group, name string) error {
	ctx, cancel := context.WithTimeout(ctx, stopWait)
	defer cancel()
	for {
		if pid := daemonPID(group, name); pid != 0 {
			stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
			if err == nil && strings.HasPrefix(string(stat[strings.LastIndexByte(string(stat), ')')+1:]), " T ") {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no process %s stands still in %s: %w", name, group, ctx.Err())
		case <-time.After(settlePoll / 10):
		}
	}
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
