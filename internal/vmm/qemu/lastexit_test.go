package qemu

import (
	"os"
	"path/filepath"
	"testing"

	"banger/internal/vmm"
)

func TestLastExit(t *testing.T) {
	dir := t.TempDir()
	for console, want := range map[string]vmm.ExitKind{
		"booting\n[    9.1] reboot: Power down\n":             vmm.ExitPowerOff,
		"booting\n[    9.1] reboot: Restarting system\n":      vmm.ExitReboot,
		"[    9.1] Kernel panic - not syncing: sysrq\nmore\n": vmm.ExitPanic,
		"reboot: Power down\nand\nit went\non\n":              "",
		"":                                                    "",
	} {
		if err := os.WriteFile(filepath.Join(dir, vmm.SerialLog), []byte(console), 0o600); err != nil {
			t.Fatal(err)
		}
		got, ok := (&Driver{}).LastExit(vmm.Machine{Dir: dir})
		if got.Kind != want || ok != (want != "") {
			t.Errorf("%q: %v, %v; want %q", console, got, ok, want)
		}
	}
}
