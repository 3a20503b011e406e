package system

import (
	"fmt"
	"os"
	"path"
	"strings"
)

// InUserUnit tells whether a process is one of this unit of a user's systemd, and not of the system's: that shows in the
// names of its control groups, of either version (cgroups(7)), which lie below that of user@UID.service.
func InUserUnit(pid int, unit string) bool {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(text)) {
		if _, group, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ":/"); ok && path.Base(group) == unit && strings.Contains("/"+group, "/user@") {
			return true
		}
	}
	return false
}
