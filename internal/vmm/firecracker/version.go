package firecracker

import (
	"cmp"
	"fmt"
	"regexp"
	"strconv"

	"banger/internal/fault"
)

// version is one of Firecracker's.
type version struct {
	major, minor, patch int
	text                string // as Firecracker says it, with a suffix if it has one
}

// The versions that this driver knows how to speak to: an API of one major version stays compatible, upstream promises.
var (
	oldest  = version{major: 1, minor: 10, text: "1.10"}
	unknown = version{major: 2, text: "2.0"}
)

var versionPattern = regexp.MustCompile(`^v?((\d{1,4})\.(\d{1,4})\.(\d{1,4})(?:[-+][0-9A-Za-z.+-]{1,64})?)$`)

// parseVersion reads "1.16.1", "v1.16.1" or "1.17.0-dev"; a suffix counts as that version.
func parseVersion(text string) (version, error) {
	m := versionPattern.FindStringSubmatch(text)
	if m == nil {
		return version{}, fault.New(fault.Precondition, "%q is no version of Firecracker", oneLine([]byte(text))).
			WithHint("install a 1.x release: see docs/firecracker.md")
	}
	v := version{text: m[1]}
	for i, part := range []*int{&v.major, &v.minor, &v.patch} {
		*part, _ = strconv.Atoi(m[i+2]) // the pattern lets only numbers through
	}
	return v, nil
}

func (v version) String() string { return v.text }

func (v version) compare(w version) int {
	return cmp.Or(cmp.Compare(v.major, w.major), cmp.Compare(v.minor, w.minor), cmp.Compare(v.patch, w.patch))
}

func (v version) atLeast(major, minor int) bool {
	return v.compare(version{major: major, minor: minor}) >= 0
}

// check refuses versions that this driver does not know.
func (v version) check() error {
	switch {
	case v.compare(oldest) < 0:
		return fault.New(fault.Precondition, "Firecracker %s is too old: %s or newer is needed", v, oldest).
			WithHint("install a newer one: see docs/firecracker.md")
	case v.compare(unknown) >= 0:
		return fault.New(fault.Precondition, "Firecracker %s is not known to this banger: it must be older than %s", v, unknown).
			WithHint("install a 1.x release: see docs/firecracker.md")
	}
	return nil
}

// What versions can do; the sources are upstream's tags and change log.

// pci tells whether devices may be on a PCI bus. Before they are on MMIO, where ACPI tells the guest of them.
func (v version) pci() bool { return v.atLeast(1, 13) }

// networkOverrides tells whether a restored machine may have other TAP devices than the saved one.
func (v version) networkOverrides() bool { return v.atLeast(1, 12) }

// bzImage tells whether it boots a compressed kernel.
func (v version) bzImage() bool { return v.atLeast(1, 17) }

// reportsFree tells whether its balloon takes reports of free memory from the guest.
func (v version) reportsFree() bool { return v.atLeast(1, 14) }

// appendsPCIOff tells whether it says pci=off itself on a machine without a PCI bus.
func (v version) appendsPCIOff() bool { return v.atLeast(1, 13) }

// deafAfterRestore tells whether a restored guest's vsock is dead: 1.16.0 alone.
func (v version) deafAfterRestore() bool {
	return v.major == 1 && v.minor == 16 && v.patch == 0
}

// warning says what is known to be wrong with a version; "" when nothing is.
func (v version) warning() string {
	if v.deafAfterRestore() {
		return fmt.Sprintf("Firecracker %s loses the guest channel of restored VMs, so that none are restored: use 1.16.1 or newer", v)
	}
	return ""
}
