package helper

import (
	"bytes"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"banger/internal/fault"
	"banger/internal/hosttest/need"
)

func TestAllowance(t *testing.T) {
	need.Root(t) // the file must be root's
	path := filepath.Join(t.TempDir(), "subnets")
	if a, err := readAllowance(path); a != nil || err != nil || a.check(netip.MustParsePrefix("10.1.0.1/16"), 1000) != nil {
		t.Errorf("without a file: %v %v", a, err)
	}
	write := func(text string, mode os.FileMode) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	write("# for VMs\n172.30.0.0/16\n 10.1.2.0/24 # of the second\n\n", 0o644)
	a, err := readAllowance(path)
	if err != nil {
		t.Fatal(err)
	}
	for text, want := range map[string]bool{
		"172.30.0.1/16": true, "172.30.7.1/24": true, "10.1.2.1/24": true, "10.1.0.1/16": false, "192.168.1.1/24": false,
	} {
		err := a.check(netip.MustParsePrefix(text), 1000)
		if (err == nil) != want || err != nil && (fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "") {
			t.Errorf("%s: %v", text, err)
		}
	}
	if err := a.check(netip.MustParsePrefix("192.168.1.1/24"), 0); err != nil {
		t.Errorf("root: %v", err)
	}
	write("", 0o644)
	if a, err := readAllowance(path); err != nil || a.check(netip.MustParsePrefix("172.30.0.1/16"), 1000) == nil {
		t.Errorf("an empty file allows something: %v", err)
	}
	for text, mode := range map[string]os.FileMode{"172.30.0.0/16\n": 0o666, "everything\n": 0o644, "fd00::/8\n": 0o644} {
		write(text, mode)
		if _, err := readAllowance(path); fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
			t.Errorf("%q with mode %o: %v", text, mode, err)
		}
	}
}

func TestBoundedLog(t *testing.T) {
	var b bytes.Buffer
	log := slog.New(newBoundedLog(slog.NewTextHandler(&b, nil), 3))
	for range 10 {
		log.With("a", 1).WithGroup("g").Warn("refused")
	}
	if text := b.String(); strings.Count(text, "refused") != 2 || strings.Count(text, "full") != 1 {
		t.Errorf("log:\n%s", text)
	}
}
