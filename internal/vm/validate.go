package vm

import (
	"slices"
	"strings"

	"github.com/docker/go-units"

	"banger/internal/fault"
)

// The smallest sizes that make sense, in bytes.
const (
	MinMemory = 128 << 20
	MinDisk   = 64 << 20
	MaxDisk   = 16 << 40 // the largest ext4 with 4 KiB blocks
)

// Bounds of rates in bytes a second: with less nothing would boot in time, and more VMMs cannot count.
const (
	MinRate = 64 << 10
	MaxRate = 64 << 30
)

// MaxAuthorizedKeys bounds the keys of one spec.
const MaxAuthorizedKeys = 64

// Limits is what the host has.
type Limits struct {
	CPUs        int
	MemoryBytes int64
	VMMs        []string // driver names that a spec may ask for, beside auto
}

// Validate refuses a spec that makes no sense on a host with these limits; all defaults must be filled in.
func (s Spec) Validate(l Limits) error {
	checks := []error{
		CheckName(s.Name), checkRef("image", s.Image), checkRef("kernel", s.Kernel), s.checkVMM(l), s.checkCPUs(l), s.checkMemory(l),
		checkDisk("disk", s.DiskBytes), checkDisk("work disk", s.WorkDiskBytes), s.checkUnits(), s.checkKeys(),
		CheckPorts(s.Ports), checkRate("disk", s.DiskRate), checkRate("network", s.NetRate),
	}
	for _, err := range checks {
		if err != nil {
			return err
		}
	}
	return nil
}

// checkRef refuses names of images and kernels that could leave their directory; empty means the default.
func checkRef(what, name string) error {
	if len(name) > 128 || strings.ContainsAny(name, "/\\\x00\n") || strings.HasPrefix(name, ".") || strings.HasPrefix(name, "-") {
		return fault.New(fault.Usage, "%q cannot name a %s", shorten(name), what)
	}
	return nil
}

func (s Spec) checkVMM(l Limits) error {
	if s.VMM == "auto" || slices.Contains(l.VMMs, s.VMM) {
		return nil
	}
	return fault.New(fault.Usage, "unknown VMM %q", shorten(s.VMM)).
		WithHint("use one of: auto, %s", strings.Join(l.VMMs, ", "))
}

func (s Spec) checkCPUs(l Limits) error {
	if s.CPUs < 1 || s.CPUs > l.CPUs {
		return fault.New(fault.Usage, "a VM cannot have %d CPUs on this host", s.CPUs).
			WithHint("use 1 to %d", l.CPUs)
	}
	return nil
}

func (s Spec) checkMemory(l Limits) error {
	switch {
	case s.MemoryBytes < MinMemory:
		return fault.New(fault.Usage, "%s of memory is too little for a VM", FormatSize(s.MemoryBytes)).
			WithHint("use at least %s", FormatSize(MinMemory))
	case s.MemoryBytes > l.MemoryBytes:
		return fault.New(fault.Usage, "%s of memory is more than this host has", FormatSize(s.MemoryBytes)).
			WithHint("use at most %s", FormatSize(l.MemoryBytes))
	case s.MemoryBytes%(1<<20) != 0:
		return fault.New(fault.Usage, "memory must be a whole number of MiB, not %d bytes", s.MemoryBytes).
			WithHint("for example 512M or 2G")
	}
	return nil
}

func checkDisk(what string, size int64) error {
	switch {
	case size < MinDisk:
		return fault.New(fault.Usage, "a %s of %s is too small", what, FormatSize(size)).
			WithHint("use at least %s", FormatSize(MinDisk))
	case size > MaxDisk:
		return fault.New(fault.Usage, "a %s of %s is too large", what, FormatSize(size)).
			WithHint("use at most %s", FormatSize(MaxDisk))
	case size%4096 != 0:
		return fault.New(fault.Usage, "the size of a %s must be a multiple of 4096 bytes, not %d", what, size).
			WithHint("for example 512M or 8G")
	}
	return nil
}

// checkRate takes 0 for none.
func checkRate(what string, rate int64) error {
	if rate == 0 || rate >= MinRate && rate <= MaxRate {
		return nil
	}
	return fault.New(fault.Usage, "a %s rate of %s a second cannot be kept", what, FormatSize(rate)).
		WithHint("use %s to %s, or leave it out for no limit", FormatSize(MinRate), FormatSize(MaxRate))
}

func (s Spec) checkUnits() error {
	if s.Units == UnitsFast || s.Units == UnitsStock {
		return nil
	}
	return fault.New(fault.Usage, "unknown choice of units %q", shorten(string(s.Units))).
		WithHint("use %s or %s", UnitsFast, UnitsStock)
}

func (s Spec) checkKeys() error {
	if len(s.AuthorizedKeys) > MaxAuthorizedKeys {
		return fault.New(fault.Usage, "%d SSH keys are too many", len(s.AuthorizedKeys)).
			WithHint("use at most %d", MaxAuthorizedKeys)
	}
	for _, k := range s.AuthorizedKeys {
		if len(k) > 16<<10 || strings.ContainsAny(k, "\n\r\x00") || len(strings.Fields(k)) < 2 {
			return fault.New(fault.Usage, "%q is no public SSH key", shorten(k)).
				WithHint("give one line as in ~/.ssh/id_ed25519.pub")
		}
	}
	return nil
}

// ParseSize reads a size as people write it: "4G", "512M", "1.5GiB" or plain bytes. Units are powers
// of 1024. What is no size is a Usage fault that shows an example.
func ParseSize(s string) (int64, error) {
	n, err := units.RAMInBytes(strings.TrimSpace(s))
	if err != nil || n < 0 {
		return 0, fault.New(fault.Usage, "%q is no size", shorten(s)).WithHint("write it like 512M, 4G or 1073741824")
	}
	return n, nil
}

// FormatSize is the reverse of ParseSize, rounded to four digits: "4GiB".
func FormatSize(n int64) string { return units.BytesSize(float64(n)) }
