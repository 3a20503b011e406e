package qemu

import "testing"

func TestThreadsByVersion(t *testing.T) {
	for version, want := range map[string]string{"7.2.22": "single", "8.0.5": "single", "8.1.0": "multi", "10.0.2": "multi", "": "multi"} {
		if got := threads(version); got != want {
			t.Errorf("QEMU %q: %s, not %s", version, got, want)
		}
	}
}
