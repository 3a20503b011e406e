package qemu

import "testing"

func TestEmulationByVersion(t *testing.T) {
	for version, want := range map[string]struct {
		threads string
		args    int
	}{"7.2.22": {"single", 2}, "8.0.5": {"single", 0}, "8.1.0": {"", 0}, "10.0.2": {"", 0}, "": {"", 0}} {
		got := platforms["amd64"].emulatedBy(version)
		if got.softwareThreads != want.threads || len(got.softwareKernelArgs) != want.args {
			t.Errorf("QEMU %q: threads %q, kernel arguments %q", version, got.softwareThreads, got.softwareKernelArgs)
		}
	}
}
