package system

import (
	"fmt"
	"os"
	"path"
	"strings"
)

// InUnit tells whether a process is one of this unit of systemd, whoever's manager it is: that shows in the names of its
// control groups, of either version (cgroups(7)).
func InUnit(pid int, unit string) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		if _, group, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ":/"); ok && path.Base(group) == unit {
			return true
		}
	}
	return false
}
