// Package build tells which build of banger this is.
package build

import "runtime/debug"

// Version is the release, and Stamp tells two builds of one release apart. The Makefile sets both.
var (
	Version = "dev"
	Stamp   = ""
)

// API is the number of the daemon's API. It grows when a client of an older number can no longer be served.
const API = 1

// ID returns what client, daemon and agent compare to see whether they are of one build.
func ID() string {
	if Stamp != "" {
		return Version + "+" + Stamp
	}
	return Version + "+" + revision()
}

// revision returns the commit that Go recorded, with a mark when the tree was changed after it.
func revision() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	rev, dirty := "unknown", ""
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			rev = s.Value
		case "vcs.modified":
			if s.Value == "true" {
				dirty = "-dirty"
			}
		}
	}
	return rev[:min(12, len(rev))] + dirty
}
