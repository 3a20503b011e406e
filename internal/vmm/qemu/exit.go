package qemu

import (
	"path/filepath"
	"time"

	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// patchedText is what a kernel says of a breakpoint that it did not expect. It sets some for a moment while it
// patches its code, and QEMU before 8.1 keeps a translation of them now and then when it emulates more than one
// processor: one that another processor changed while it was being translated.
const patchedText = "int3: 0000 [#"

// lastWords is how long the monitor may take to deliver its last event after the process has ended.
const lastWords = time.Second

// classify says how a machine ended, which had software for processors or KVM: by the monitor's word; where there is none, because nobody was
// connected, by the last lines of the console.
func classify(dir string, software bool, mon *monitor, s system.ExitStatus, stopped bool) vmm.Exit {
	reason := ""
	if mon != nil {
		select {
		case <-mon.done:
		case <-time.After(lastWords):
		}
		reason = mon.shutdownReason()
	}
	console := machine.Tail(filepath.Join(dir, vmm.SerialLog), 500)
	return blame(judge(reason, console, s, stopped), console, software)
}

// blame tells a panic of the emulation's making from one of the guest's.
func blame(e vmm.Exit, console []string, software bool) vmm.Exit {
	if e.Kind != vmm.ExitPanic || !software {
		return e
	}
	if _, ok := machine.LastLine(console, patchedText); ok {
		e.Emulation = true
		e.Detail += " (int3: QEMU without KVM ran code that was being patched)"
	}
	return e
}

// judge weighs the reason of QEMU's SHUTDOWN event (qapi/run-state.json: ShutdownCause) and the console.
func judge(reason string, console []string, s system.ExitStatus, stopped bool) vmm.Exit {
	switch reason {
	case "guest-shutdown":
		return vmm.Exit{Kind: vmm.ExitPowerOff, Detail: "the guest powered itself off"}
	case "guest-reset", "guest-panic", "subsystem-reset":
		// The kernel resets the machine after a panic as it does on a reboot.
		if line, ok := machine.LastLine(console, machine.PanicText); ok {
			return vmm.Exit{Kind: vmm.ExitPanic, Detail: line}
		}
		return vmm.Exit{Kind: vmm.ExitReboot, Detail: "the guest asked for a reboot"}
	case "":
		if e, ok := machine.FromConsole(console); ok && !stopped && s.Signal == 0 {
			return e
		}
	}
	return machine.ClassifyStatus(s, stopped)
}
