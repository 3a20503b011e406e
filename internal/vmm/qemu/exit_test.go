package qemu

import (
	"strings"
	"syscall"
	"testing"

	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

func TestJudge(t *testing.T) {
	exited := system.ExitStatus{Known: true}
	killed := system.ExitStatus{Code: -1, Signal: syscall.SIGKILL, Known: true}
	unknown := system.ExitStatus{}
	oops := []string{"[    1.0] Kernel panic - not syncing: VFS: Unable to mount root fs", "[    1.1] CPU: 0", "[    1.2] ---[ end"}
	down := []string{"[    9.0] reboot: Power down"}
	again := []string{"[    9.0] reboot: Restarting system"}
	login := []string{"web login: "}
	for name, c := range map[string]struct {
		reason  string
		console []string
		status  system.ExitStatus
		stopped bool
		want    vmm.ExitKind
	}{
		"power-off":                   {"guest-shutdown", down, exited, false, vmm.ExitPowerOff},
		"power-off while we stop it":  {"guest-shutdown", down, exited, true, vmm.ExitPowerOff},
		"reboot":                      {"guest-reset", again, exited, false, vmm.ExitReboot},
		"panic":                       {"guest-reset", oops, exited, false, vmm.ExitPanic},
		"our quit":                    {"host-qmp-quit", login, exited, true, vmm.ExitStopped},
		"our kill":                    {"", login, killed, true, vmm.ExitStopped},
		"somebody's SIGTERM":          {"host-signal", login, exited, false, vmm.ExitKilled},
		"somebody's SIGKILL":          {"", login, killed, false, vmm.ExitKilled},
		"killed right after it slept": {"", down, killed, false, vmm.ExitKilled},
		"unseen power-off":            {"", down, unknown, false, vmm.ExitPowerOff},
		"unseen reboot":               {"", again, unknown, false, vmm.ExitReboot},
		"unseen panic":                {"", oops, unknown, false, vmm.ExitPanic},
		"unseen kill":                 {"", login, unknown, false, vmm.ExitKilled},
		"QEMU fails":                  {"", login, system.ExitStatus{Code: 1, Known: true}, false, vmm.ExitCrash},
		"QEMU aborts":                 {"", login, system.ExitStatus{Code: -1, Signal: syscall.SIGABRT, Known: true}, false, vmm.ExitCrash},
	} {
		if got := judge(c.reason, c.console, c.status, c.stopped); got.Kind != c.want || got.Detail == "" {
			t.Errorf("%s: %+v, want %s", name, got, c.want)
		}
	}
	if got := judge("guest-reset", oops, exited, false).Detail; got != "Kernel panic - not syncing: VFS: Unable to mount root fs" {
		t.Errorf("detail %q", got)
	}
}

// TestBlame: a panic at code that was being patched is the emulation's, unless the processors are real.
func TestBlame(t *testing.T) {
	patched := []string{
		"[    3.3] Oops: int3: 0000 [#1] PREEMPT SMP NOPTI", "[    3.3] RIP: 0010:sched_clock_cpu+0x1a/0xd0",
		"[    3.4] Kernel panic - not syncing: Fatal exception in interrupt",
	}
	other := []string{"[    1.0] Oops: 0002 [#1] PREEMPT SMP NOPTI", patched[2]}
	for name, c := range map[string]struct {
		console  []string
		software bool
		want     bool
	}{
		"patched":           {patched, true, true},
		"patched, on KVM":   {patched, false, false},
		"another exception": {other, true, false},
	} {
		e := blame(judge("guest-reset", c.console, system.ExitStatus{Known: true}, false), c.console, c.software)
		if e.Kind != vmm.ExitPanic || e.Emulation != c.want || !strings.HasPrefix(e.Detail, machine.PanicText) {
			t.Errorf("%s: %+v", name, e)
		}
	}
	down := append(patched, "[    9.0] reboot: Power down")
	if e := blame(judge("guest-shutdown", down, system.ExitStatus{Known: true}, false), down, true); e.Emulation {
		t.Errorf("a guest that survived: %+v", e)
	}
}
