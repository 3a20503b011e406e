package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"banger/internal/client"
	"banger/internal/fault"
	"banger/internal/hosttest/need"
	"banger/internal/system"
)

// inUnit puts a process where systemd has the processes of the unit bangerd.
func inUnit(t *testing.T, pid int) {
	t.Helper()
	need.Root(t)
	t.Setenv("XDG_RUNTIME_DIR", t.TempDir())
	root := t.TempDir()
	if err := unix.Mount("cgroup2", root, "cgroup2", 0, ""); err != nil {
		need.Missing(t, "cgroup2", err.Error())
	}
	t.Cleanup(func() { _ = unix.Unmount(root, unix.MNT_DETACH) })
	slice := filepath.Join(root, "banger-test-"+filepath.Base(filepath.Dir(root)))
	manager := filepath.Join(slice, "user@0.service")
	group := filepath.Join(manager, "bangerd.service")
	if err := os.MkdirAll(group, 0o755); err != nil {
		need.Missing(t, "cgroup2", err.Error())
	}
	t.Cleanup(func() { system.RemoveCgroup(group); system.RemoveCgroup(manager); system.RemoveCgroup(slice) })
	if err := os.WriteFile(filepath.Join(group, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0); err != nil {
		t.Fatal(err)
	}
}

// systemctl puts a program of that name, with these lines of shell, first into PATH. It notes its arguments in the file
// returned.
func (p place) systemctl(t *testing.T, lines string) (asked string) {
	t.Helper()
	dir := t.TempDir()
	asked = filepath.Join(dir, "asked")
	text := "#!/bin/sh\necho \"$@\" >>'" + asked + "'\n" + lines
	if err := os.WriteFile(filepath.Join(dir, "systemctl"), []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
	return asked
}

// restarting is what systemctl does: it ends the daemon and starts another, which listens then. Meanwhile no client may start one.
func (p place) restarting(pid int) string {
	return fmt.Sprintf(`[ "$2" = restart ] || exit 0
flock -n '%s' true && echo 'while others could start one' >>"${0%%/*}/asked"
kill %d
for i in $(seq 600); do kill -0 %d 2>/dev/null || break; sleep 0.05; done
setsid '%s' >/dev/null 2>&1 </dev/null &
for i in $(seq 600); do [ -S '%s' ] && exit 0; sleep 0.05; done
exit 1
`, p.StartLock(), pid, pid, p.options().Command[0], p.Socket())
}

func TestSystemdsDaemonStaysSystemds(t *testing.T) {
	need.Binary(t, "flock")
	for name, newer := range map[string]bool{"restart": false, "another build": true} {
		t.Run(name, func(t *testing.T) {
			p := newPlace(t)
			p.dial(t, buildVariable+"=old").Close()
			first := p.daemon(t)
			inUnit(t, first.PID())
			asked := p.systemctl(t, p.restarting(first.PID()))
			begin := renewed
			if newer {
				begin = client.Dial
			}
			c, err := begin(t.Context(), p.options())
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			awaitDone(t, first)
			second := p.daemon(t)
			if got, err := os.ReadFile(asked); err != nil || string(got) != "--user daemon-reload\n--user restart bangerd.service\n" {
				t.Errorf("systemd was asked %q, %v", got, err)
			}
			if second.PID() == first.PID() {
				t.Error("the same daemon runs")
			}
		})
	}
}

func TestSystemdCannotRestart(t *testing.T) {
	p := newPlace(t)
	p.dial(t).Close()
	first := p.daemon(t)
	inUnit(t, first.PID())
	p.systemctl(t, "echo 'no medium found' >&2\nexit 1\n")
	err := client.Renew(t.Context(), p.options())
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "no medium found") || !strings.Contains(fault.HintOf(err), "systemctl --user status bangerd") {
		t.Errorf("%v, %s", err, fault.HintOf(err))
	}
	// It is another program's unit for a banger that lies elsewhere.
	elsewhere := p.options()
	elsewhere.Command = []string{"/bin/true"}
	if err := client.Renew(t.Context(), elsewhere); err != nil {
		t.Fatal(err)
	}
	awaitDone(t, first)
}
