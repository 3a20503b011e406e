package system

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

func TestInUserUnit(t *testing.T) {
	_, group := mountCgroups(t)
	p, err := Start(StartOptions{Path: "/bin/sleep", Args: []string{"100"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	theirs := filepath.Join(group, "user@7.service")
	t.Cleanup(func() { RemoveCgroup(filepath.Join(theirs, "ours")); RemoveCgroup(theirs) })
	if err := os.MkdirAll(filepath.Join(theirs, "ours"), 0o755); err != nil {
		t.Fatal(err)
	}
	for dir, units := range map[string]map[string]bool{
		filepath.Join(group, "app.slice"): {"ours": false}, // which the system's manager looks after
		theirs:                            {"ours": true, "user@7.service": false, "": false, "/": false},
	} {
		if err := os.WriteFile(filepath.Join(dir, "ours", "cgroup.procs"), []byte(strconv.Itoa(p.PID())), 0); err != nil {
			t.Fatal(err)
		}
		for unit, want := range units {
			if got := InUserUnit(p.PID(), unit); got != want {
				t.Errorf("in %q of %s: %v", unit, dir, got)
			}
		}
	}
	if err := p.Signal(9); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if InUserUnit(p.PID(), "ours") {
		t.Error("who has ended is in a unit")
	}
}
