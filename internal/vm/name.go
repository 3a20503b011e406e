package vm

import (
	"crypto/rand"
	"encoding/hex"
	"regexp"
	"slices"

	"banger/internal/fault"
)

// reserved names mean something else where a VM's name is used: in DNS, in /etc/hosts, on the command line.
var reserved = []string{"localhost", "host", "gateway", "bridge", "all", "vm", "banger", "broadcasthost", "ip6-localhost", "ip6-loopback"}

var (
	namePattern = regexp.MustCompile(`^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$`)
	idPattern   = regexp.MustCompile(`^[0-9a-f]{8}$`)
)

// NewID returns a random ID.
func NewID() ID {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails: crypto/rand.Read ends the program instead
	return ID(hex.EncodeToString(b[:]))
}

// IsID tells whether s has the form of an ID.
func IsID(s string) bool { return idPattern.MatchString(s) }

// CheckName refuses what cannot name a VM with a Usage fault. A name is one DNS label (RFC 1035:
// at most 63 characters) in lower case that is not reserved and cannot be taken for an ID.
func CheckName(name string) error {
	const hint = "use 1 to 63 lower-case letters, digits and hyphens, starting with a letter: web, build-2"
	switch {
	case name == "":
		return fault.New(fault.Usage, "a VM needs a name").WithHint(hint)
	case !namePattern.MatchString(name):
		return fault.New(fault.Usage, "%q cannot name a VM: it is no DNS label", shorten(name)).WithHint(hint)
	case slices.Contains(reserved, name):
		return fault.New(fault.Usage, "%q cannot name a VM: the name is reserved", name).WithHint("choose another name")
	case IsID(name):
		return fault.New(fault.Usage, "%q cannot name a VM: it could be taken for an id", name).WithHint("choose another name")
	}
	return nil
}

// shorten keeps a name from outside from filling the screen.
func shorten(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return s[:most] + "…"
}
