package firecracker

import (
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"

	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// exits are what Firecracker's exit codes mean, beside 0, the guest's reset.
var exits = map[int]string{
	1:   "a general error",
	2:   "an internal error",
	148: "its filter of system calls stopped it",
	149: "SIGBUS: the host has no memory left for it, or a memory file was cut",
	150: "SIGSEGV",
	151: "a file grew above the limit on its size",
	152: "a bad log level",
	153: "a bad command line",
	154: "SIGXCPU",
	156: "SIGHUP",
	157: "SIGILL",
}

// exitMeaning is what a status means; "" when it says all itself.
func exitMeaning(s system.ExitStatus) string {
	if s.Signal == syscall.SIGABRT {
		return "Firecracker panicked"
	}
	return exits[s.Code]
}

// ending is what is known of a machine's end beside its process's status.
type ending struct {
	stopped bool     // by us
	pressed bool     // the power button was, so that a reset is the end that was asked for
	halted  string   // the line after which the guest stood still, and was ended; "" when it did not
	console []string // its last lines
	said    []string // Firecracker's
}

// judge says how a machine ended. Code 0 is a reset by the guest: also after a panic, and where it was asked for the
// end by the power button, which is all that its key combination can do.
func judge(s system.ExitStatus, e ending) vmm.Exit {
	if e.halted != "" {
		return vmm.Exit{Kind: vmm.ExitPowerOff, Detail: e.halted}
	}
	s = orSaid(s, e.said)
	if line := processorError(e.said); line != "" && !e.stopped {
		return vmm.Exit{Kind: vmm.ExitCrash, Detail: s.String() + ": " + line}
	}
	switch {
	case !s.Known:
		if exit, ok := machine.FromConsole(e.console); ok && !e.stopped {
			return exit
		}
	case s.Signal == 0 && s.Code == 0:
		return reset(s, e)
	case s.Signal == 0 || s.Signal == syscall.SIGABRT:
		exit := vmm.Exit{Kind: vmm.ExitCrash, Detail: s.String()}
		if e.stopped {
			exit.Kind = vmm.ExitStopped
		}
		if meaning := exitMeaning(s); meaning != "" {
			exit.Detail += " (" + meaning + ")"
		}
		if len(e.said) > 0 {
			exit.Detail += ": " + e.said[len(e.said)-1]
		}
		return exit
	}
	return machine.ClassifyStatus(s, e.stopped)
}

// processorError returns the line of the log that says that KVM gave the guest's processor up, or "". The code of the end
// is no proof of the contrary: 1.16.1 was seen to end with 0 then, about every third time.
func processorError(said []string) string {
	for _, line := range said {
		if at := strings.Index(line, "Received KVM_EXIT_"); at >= 0 {
			return line[at:]
		}
	}
	return ""
}

// reset says what the guest meant by its reset.
func reset(s system.ExitStatus, e ending) vmm.Exit {
	exit, ok := machine.FromConsole(e.console)
	switch {
	case ok && exit.Kind == vmm.ExitReboot && e.pressed:
		exit.Kind = vmm.ExitPowerOff
	case ok:
	case e.pressed:
		exit = vmm.Exit{Kind: vmm.ExitPowerOff, Detail: "the guest ended after the power button"}
	case e.stopped:
		exit = vmm.Exit{Kind: vmm.ExitStopped, Detail: s.String()}
	default:
		exit = vmm.Exit{Kind: vmm.ExitReboot, Detail: "the guest reset the machine"}
	}
	return exit
}

// codePattern is how Firecracker's log tells of its end.
var codePattern = regexp.MustCompile(`exit_code=(\d{1,3})\b`)

// orSaid takes the code of a process that was no child of ours from its log.
func orSaid(s system.ExitStatus, said []string) system.ExitStatus {
	if s.Known || len(said) == 0 {
		return s
	}
	if m := codePattern.FindStringSubmatch(said[len(said)-1]); m != nil {
		code, _ := strconv.Atoi(m[1]) // three digits at most
		return system.ExitStatus{Code: code, Known: true}
	}
	return s
}

// LastExit tells how a machine ended that nobody watched, when its console says so. The console's log is a
// new one at each start.
func (d *Driver) LastExit(m vmm.Machine) (vmm.Exit, bool) {
	return machine.FromConsole(console(m.Dir))
}

func console(dir string) []string {
	return machine.Tail(filepath.Join(dir, vmm.SerialLog), 500)
}
