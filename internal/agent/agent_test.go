package agent

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestMainSaysHowItIsUsed(t *testing.T) {
	for _, args := range [][]string{{}, {"serve"}, {"nonsense", "x"}, {"version", "x"}} {
		var out, errs bytes.Buffer
		if code := Main(args, &out, &errs); code != 1 || !strings.Contains(errs.String(), "usage:") {
			t.Errorf("%q: code %d, %q", args, code, errs.String())
		}
	}
	var out, errs bytes.Buffer
	if code := Main([]string{"version"}, &out, &errs); code != 0 || strings.TrimSpace(out.String()) == "" {
		t.Errorf("version: code %d, %q", code, out.String())
	}
}

func TestListening(t *testing.T) {
	const table = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:0016 00000000:0000 01 00000000:00000000 00:00000000 00000000     0        0 1 1 0 100 0 0 10 0
   1: 00000000:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0 100 0 0 10 0
`
	if listening(table, 22) {
		t.Error("a connection is taken for a listener")
	}
	if !listening(table, 8080) {
		t.Error("the listener is not found")
	}
	if !listening("  0: 00000000000000000000000000000000:0016 x 0A", 22) {
		t.Error("IPv6 is not read")
	}
	if listening("garbage\n0: nocolon x 0A\n", 22) {
		t.Error("garbage listens")
	}
}

func TestMemory(t *testing.T) {
	total, available := memory("MemTotal:  1000 kB\nMemFree: 1 kB\nMemAvailable: 500 kB\nbroken\n")
	if total != 1000<<10 || available != 500<<10 {
		t.Errorf("got %d, %d", total, available)
	}
}

func TestFindPort(t *testing.T) {
	class := t.TempDir()
	for device, name := range map[string]string{"vport0p1": "other", "vport0p2": "banger.agent.0"} {
		if err := os.Mkdir(filepath.Join(class, device), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(class, device, "name"), []byte(name+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := findPort(class, "banger.agent.0"); got != "vport0p2" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := findPort(class, "none"); got != "" || err != nil {
		t.Errorf("got %q, %v", got, err)
	}
}
