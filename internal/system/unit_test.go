package system

import (
	"os"
	"path/filepath"
	"strconv"
	"testing"
)

func TestInUnit(t *testing.T) {
	root, group := mountCgroups(t)
	p, err := Start(StartOptions{Path: "/bin/sleep", Args: []string{"100"}})
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	ours := filepath.Join(group, "app.slice", "ours")
	if err := os.WriteFile(filepath.Join(ours, "cgroup.procs"), []byte(strconv.Itoa(p.PID())), 0); err != nil {
		t.Fatal(err)
	}
	for unit, want := range map[string]bool{"ours": true, "app.slice": false, "": false, "/": false} {
		if got := InUnit(p.PID(), unit); got != want {
			t.Errorf("in %q below %s: %v", unit, root, got)
		}
	}
	if err := p.Signal(9); err != nil {
		t.Fatal(err)
	}
	<-p.Done()
	if InUnit(p.PID(), "ours") {
		t.Error("who has ended is in a unit")
	}
}
