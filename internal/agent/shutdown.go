package agent

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/boot"
	"banger/internal/agent/serve"
)

const (
	// What systemd takes for "start poweroff.target" and "start reboot.target", systemd(1).
	signalPowerOff = syscall.Signal(34 + 4) // SIGRTMIN+4
	signalReboot   = syscall.Signal(34 + 5)

	// systemdWait bounds the wait for a systemd that has only just been started and would lose the signal.
	systemdWait = 30 * time.Second
	systemdPoll = 50 * time.Millisecond

	termGrace = 3 * time.Second // between SIGTERM and SIGKILL without systemd

	// lastWords is the time in which the host is told what was asked for last and how the programs ended.
	lastWords = 50 * time.Millisecond
)

// shutdown begins a power-off or reboot. What ends the machine at once is begun when the caller has its answer.
func shutdown(ctx context.Context, mode agentv1.ShutdownRequest_Mode) error {
	reboot := mode == agentv1.ShutdownRequest_MODE_REBOOT
	switch firstProcess() {
	case systemd:
		if systemdListens() {
			return signalSystemd(reboot)
		}
		go func() { // outlives the call: the caller wants to go on
			if !awaitSystemd() || signalSystemd(reboot) != nil {
				halt(reboot)
			}
		}()
		return nil
	case supervisor:
		serve.Later(ctx, func() { go halt(reboot) })
		return nil
	}
	// Another init: these are what BusyBox and OpenRC and sysvinit agree on least badly.
	if reboot {
		return syscall.Kill(1, syscall.SIGTERM)
	}
	return syscall.Kill(1, syscall.SIGUSR2)
}

type initKind int

const (
	systemd initKind = iota
	supervisor
	otherInit
)

// firstProcess tells what runs as pid 1. Our own init in its last moments counts as what it becomes.
func firstProcess() initKind { return kindOf("/proc/1", boot.Init) }

// kindOf tells what the process of a directory like /proc/1 is, or becomes when it is our init: next tells the program of
// the image's.
func kindOf(process string, next func() string) initKind {
	b, err := os.ReadFile(filepath.Join(process, "cmdline"))
	if err != nil {
		return otherInit
	}
	args := strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
	if len(args) > 1 && args[1] == "supervise" {
		return supervisor
	}
	comm, err := os.ReadFile(filepath.Join(process, "comm"))
	if err != nil {
		return otherInit
	}
	if strings.TrimSpace(string(comm)) == "systemd" {
		return systemd
	}
	// Not there yet: systemd names itself once it runs. Where our own init lies cannot be named any more, only opened: it
	// is in the root that was there before the image's.
	program := filepath.Join(process, "exe")
	if ours(program) {
		program = next()
	}
	init, err := filepath.EvalSymlinks(program)
	if err == nil && filepath.Base(init) == "systemd" {
		return systemd
	}
	return otherInit
}

// ours tells whether a file is this program.
func ours(name string) bool {
	theirs, err := os.Stat(name)
	if err != nil {
		return false
	}
	own, err := os.Stat("/proc/self/exe")
	return err == nil && os.SameFile(theirs, own)
}

// systemdListens tells whether systemd has come so far as to heed signals.
func systemdListens() bool {
	_, err := os.Stat("/run/systemd/private")
	return err == nil
}

func awaitSystemd() bool {
	for end := time.Now().Add(systemdWait); time.Now().Before(end); time.Sleep(systemdPoll) {
		if systemdListens() {
			return true
		}
	}
	return false
}

func signalSystemd(reboot bool) error {
	if reboot {
		return syscall.Kill(1, signalReboot)
	}
	return syscall.Kill(1, signalPowerOff)
}

// othersLive tells whether programs run beside this one and the first process. The kernel's own threads
// and the dead have no executable.
func othersLive() bool {
	links, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		return false
	}
	own := []string{"/proc/1/exe", fmt.Sprintf("/proc/%d/exe", os.Getpid())}
	return slices.ContainsFunc(links, func(link string) bool {
		_, err := os.Readlink(link)
		return err == nil && !slices.Contains(own, link)
	})
}

// halt ends all processes and the machine, without the help of an init.
func halt(reboot bool) {
	_ = syscall.Kill(-1, syscall.SIGTERM) // fails when there is nobody else
	for end := time.Now().Add(termGrace); time.Now().Before(end); time.Sleep(systemdPoll) {
		if !othersLive() {
			break
		}
	}
	_ = syscall.Kill(-1, syscall.SIGKILL)
	unix.Sync()
	time.Sleep(lastWords)
	command := unix.LINUX_REBOOT_CMD_POWER_OFF
	if reboot {
		command = unix.LINUX_REBOOT_CMD_RESTART
	}
	_ = unix.Reboot(command) // as root it does not return
}
