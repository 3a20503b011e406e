package adopt

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/agent/run"
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
