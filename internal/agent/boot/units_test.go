package boot

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	agentv1 "banger/api/agent/v1"
)

func readText(t *testing.T, root, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(root, name))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

var config = &agentv1.GuestConfig{
	MaskedUnits: []string{"apt-daily.timer", "systemd-gpt-auto-generator"}, ChannelPort: "banger.agent.0",
}

func TestUnits(t *testing.T) {
	root := t.TempDir()
	for range 2 {
		if err := writeUnits(root, config); err != nil {
			t.Fatal(err)
		}
	}
	for name, want := range map[string]string{
		"run/systemd/system/apt-daily.timer":                              "/dev/null",
		"run/systemd/system-generators/systemd-gpt-auto-generator":        "/dev/null",
		"run/systemd/system/multi-user.target.wants/banger-agent.service": "../banger-agent.service",
	} {
		if got, err := os.Readlink(filepath.Join(root, name)); got != want {
			t.Errorf("%s points to %q, %v; want %q", name, got, err, want)
		}
	}
	if unit := readText(t, root, "run/systemd/system/banger-agent.service"); !strings.Contains(unit, "adopt banger.agent.0\n") {
		t.Errorf("the unit does not name the port:\n%s", unit)
	}
}

func TestMaskRefusesPaths(t *testing.T) {
	for _, name := range []string{"", "../../etc/passwd", "a/b", ".", ".."} {
		if err := mask(t.TempDir(), []string{name}); err == nil {
			t.Errorf("%q was masked", name)
		}
	}
}

func TestChannelNames(t *testing.T) {
	for want, cfg := range map[string]*agentv1.GuestConfig{
		"banger.agent.0": config,
		"vsock:1024":     {ChannelVsockPort: 1024},
		"":               {},
	} {
		if got := channelOf(cfg); got != want {
			t.Errorf("%v names %q, want %q", cfg, got, want)
		}
	}
}
