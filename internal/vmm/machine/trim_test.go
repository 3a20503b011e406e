package machine

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestTrim(t *testing.T) {
	path := filepath.Join(t.TempDir(), "serial.log")
	log, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	write := func(s string) {
		if _, err := log.WriteString(s); err != nil {
			t.Fatal(err)
		}
	}
	write(strings.Repeat("a", 90) + "0123456789")
	if err := trim(path, 100); err != nil {
		t.Fatal(err)
	}
	if info, _ := os.Stat(path); info.Size() != 100 {
		t.Errorf("a short log was cut to %d", info.Size())
	}
	write("end")
	if err := trim(path, 100); err != nil {
		t.Fatal(err)
	}
	write("more")
	now, _ := os.ReadFile(path)
	before, _ := os.ReadFile(path + ".1")
	if string(now) != "more" || len(before) != 100 || !strings.HasSuffix(string(before), "9end") {
		t.Errorf("now %q, before %d bytes", now, len(before))
	}
}

func TestTrimmerRestsWithoutMachines(t *testing.T) {
	var tr Trimmer
	a, b := tr.Watch("x"), tr.Watch("x", "y")
	a()
	a()
	if len(tr.logs) != 2 || tr.timer == nil {
		t.Errorf("%v", tr.logs)
	}
	b()
	if len(tr.logs) != 0 || tr.timer != nil {
		t.Errorf("%v", tr.logs)
	}
}
