package vm

import (
	"regexp"

	"banger/internal/fault"
)

// tagPattern is one DNS label (RFC 1123): unlike a VM's name it may begin with a digit.
var tagPattern = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// CheckTag refuses what cannot name a snapshot with a Usage fault. Tags are unique per VM and are given
// beside the VM's name, never in its place; where both are written as one word it is NAME@TAG.
func CheckTag(tag string) error {
	if tagPattern.MatchString(tag) {
		return nil
	}
	return fault.New(fault.Usage, "%q cannot be the tag of a snapshot: it is no DNS label", shorten(tag)).
		WithHint("use 1 to 63 lower-case letters, digits and hyphens: before-upgrade, v2")
}
