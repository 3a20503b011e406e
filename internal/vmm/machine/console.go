package machine

import (
	"strings"

	"banger/internal/vmm"
)

// What Linux writes on its console last.
const (
	PanicText    = "Kernel panic - not syncing"
	powerOffText = "reboot: Power down"
	haltText     = "reboot: System halted"
	restartText  = "reboot: Restarting system"
	// noPowerText is what a power-off says where there is nothing to switch off with (kernel/reboot.c): the machine stands.
	noPowerText = "reboot: Power off not available: System halted instead"
)

// FromConsole believes the console's end alone: a guest that said it long ago has gone on since.
func FromConsole(console []string) (vmm.Exit, bool) {
	tail := console[max(0, len(console)-3):]
	for text, kind := range map[string]vmm.ExitKind{
		powerOffText: vmm.ExitPowerOff, haltText: vmm.ExitPowerOff, noPowerText: vmm.ExitPowerOff, restartText: vmm.ExitReboot,
	} {
		if line, ok := LastLine(tail, text); ok {
			return vmm.Exit{Kind: kind, Detail: line}, true
		}
	}
	if line, ok := LastLine(console[max(0, len(console)-60):], PanicText); ok {
		return vmm.Exit{Kind: vmm.ExitPanic, Detail: line}, true
	}
	return vmm.Exit{}, false
}

// Halted tells whether the console's last word is that of a machine which stands still for good, and says the line.
func Halted(console []string) (string, bool) {
	if len(console) == 0 {
		return "", false
	}
	for _, text := range []string{powerOffText, haltText, noPowerText} {
		if line, ok := LastLine(console[len(console)-1:], text); ok && line == text {
			return line, true
		}
	}
	return "", false
}

// LastLine returns the last line that holds text, from there on.
func LastLine(lines []string, text string) (string, bool) {
	for i := len(lines) - 1; i >= 0; i-- {
		if at := strings.Index(lines[i], text); at >= 0 {
			return lines[i][at:], true
		}
	}
	return "", false
}
