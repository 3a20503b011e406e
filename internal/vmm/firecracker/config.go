package firecracker

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"banger/internal/fault"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// Limits of Firecracker's machines.
const (
	maxCPUs      = 32
	maxCmdline   = 2048 // bytes, with what Firecracker appends
	perDevice    = 48   // bytes of it for each device: "virtio_mmio.device=4K@0xc0001000:5" and room
	otherDevices = 2    // vsock and entropy

	maxMMIO = 17 // devices; 18 before 1.15
	maxPCI  = 31
)

// guestCID is every guest's vsock address: which guest is meant the socket's path says, and what was saved keeps it.
const guestCID = 3

// platform is what differs between the architectures of hosts.
type platform struct {
	kernelArgs []string
	ctrlAltDel bool // whether there is a keyboard to ask for the end with
}

var platforms = map[string]platform{
	"amd64": {
		// A machine without ACPI's power control ends by its keyboard's reset line. One mouse port, no probing of more.
		kernelArgs: []string{
			"console=ttyS0", "reboot=k", "panic=-1", "cryptomgr.notests", "i8042.noaux", "i8042.nomux", "i8042.dumbkbd",
		},
		ctrlAltDel: true,
	},
	"arm64": {kernelArgs: []string{"console=ttyS0", "reboot=k", "panic=-1"}},
}

// cmdline is the kernel's command line. There is never a nomodule in it, which upstream's own default has: the guests'
// kernels are distributions', made of modules.
func cmdline(p platform, v version, m vmm.Machine) string {
	args := append([]string{}, p.kernelArgs...)
	if !v.pci() && !v.appendsPCIOff() {
		args = append(args, "pci=off")
	}
	return strings.Join(append(args, m.Cmdline...), " ")
}

// drivePath is where a drive is found, relative to the machine's directory: a link that leads to the disk. What was
// saved names its drives by these, and means those of the machine that it is restored as.
func drivePath(role string) string { return "drive." + role }

func interfaceID(i int) string { return fmt.Sprintf("net%d", i) }

// configure tells a Firecracker that has just started what it is, device by device; the order is the guest's.
func configure(ctx context.Context, c *client, p platform, v version, m vmm.Machine) error {
	calls := []struct {
		path string
		body any
	}{
		{"/machine-config", machineConfig{CPUs: m.CPUs, MemoryMiB: m.MemoryBytes >> 20}},
		{"/boot-source", bootSource{Kernel: m.Kernel, Initrd: m.Initramfs, Args: cmdline(p, v, m)}},
	}
	for _, call := range calls {
		if err := c.put(ctx, call.path, call.body); err != nil {
			return err
		}
	}
	for _, d := range m.Disks {
		body := drive{ID: d.Role, Path: drivePath(d.Role), ReadOnly: d.ReadOnly, Limit: limited(m.DiskRate)}
		if !d.ReadOnly {
			body.Cache = writeback
		}
		if err := c.put(ctx, "/drives/"+d.Role, body); err != nil {
			return err
		}
	}
	for i, n := range m.NICs {
		body := networkInterface{ID: interfaceID(i), TAP: n.TAP, MAC: n.MAC, RX: limited(m.NetRate), TX: limited(m.NetRate)}
		if err := c.put(ctx, "/network-interfaces/"+body.ID, body); err != nil {
			return err
		}
	}
	if err := c.put(ctx, "/vsock", vsockDevice{CID: guestCID, Path: vmm.GuestSocket}); err != nil {
		return err
	}
	if err := c.put(ctx, "/entropy", entropyDevice{}); err != nil || !m.Balloon {
		return err
	}
	return c.put(ctx, "/balloon", balloon{DeflateOnOOM: true, Reporting: true})
}

// layout is a hash of what must be the same for saved state to fit: the devices and their order, without what may
// differ between the machines restored from one.
func layout(v version, m vmm.Machine) string {
	var b strings.Builder
	fmt.Fprintf(&b, "pci=%t nics=%d\n", v.pci(), len(m.NICs))
	for _, n := range m.NICs {
		if !v.networkOverrides() {
			fmt.Fprintln(&b, n.TAP)
		}
	}
	for _, d := range m.Disks {
		fmt.Fprintln(&b, d.Role, d.ReadOnly)
	}
	if m.Balloon {
		fmt.Fprintln(&b, "balloon")
	}
	sum := sha256.Sum256([]byte(b.String()))
	return hex.EncodeToString(sum[:])
}

// idPattern is what Firecracker takes for the id of a device.
var idPattern = regexp.MustCompile(`^[A-Za-z0-9_]{1,64}$`)

func deviceCount(m vmm.Machine) int {
	n := len(m.Disks) + len(m.NICs) + otherDevices
	if m.Balloon {
		n++
	}
	return n
}

// checkMachine finds what Firecracker's machines cannot be.
func checkMachine(v version, m vmm.Machine) error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Usage, "machine %s: %s", m.Name, fmt.Sprintf(format, args...))
	}
	devices, most := deviceCount(m), maxMMIO
	if v.pci() {
		most = maxPCI
	}
	switch {
	case m.CPUs < 1 || m.CPUs > maxCPUs:
		return bad("Firecracker runs 1 to %d CPUs, not %d", maxCPUs, m.CPUs)
	case m.MemoryBytes < 1<<20 || m.MemoryBytes%(1<<20) != 0:
		return bad("%d bytes of memory are no whole number of MiB", m.MemoryBytes)
	case devices > most:
		return bad("%d devices, the most is %d", devices, most)
	case m.Balloon && !v.reportsFree():
		return bad("Firecracker %s has no balloon that takes unused memory back; 1.14 and newer have", v)
	}
	roles := map[string]bool{}
	for _, d := range m.Disks {
		if !idPattern.MatchString(d.Role) || roles[d.Role] {
			return bad("two disks have the role %q, or it cannot be a name", d.Role)
		}
		roles[d.Role] = true
	}
	return nil
}

// checkBoot finds what cannot be booted.
func checkBoot(p platform, v version, m vmm.Machine) error {
	if !filepath.IsAbs(m.Kernel) {
		return fault.New(fault.Usage, "machine %s: the kernel's path %q is not absolute", m.Name, m.Kernel)
	}
	most := maxCmdline
	if !v.pci() {
		most -= perDevice * deviceCount(m)
	}
	if n := len(cmdline(p, v, m)); n >= most {
		return fault.New(fault.Usage, "machine %s: the kernel's command line has %d bytes, the most is %d", m.Name, n, most-1)
	}
	if err := machine.CheckHost(m); err != nil {
		return err
	}
	return checkKernel(v, m.Kernel)
}

// What kernels begin with: ELF; the boot sector of a bzImage (Documentation/arch/x86/boot.rst); arm64's Image
// (Documentation/arch/arm64/booting.rst).
const (
	elfMagic   = "\x7fELF"
	bzMagic    = "HdrS"
	bzAt       = 0x202
	imageMagic = "ARMd"
	imageAt    = 0x38
)

// kernelFormat tells what a kernel's file is: elf, bzimage, image or "".
func kernelFormat(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	head := make([]byte, bzAt+len(bzMagic))
	n, err := io.ReadFull(f, head)
	if err != nil && err != io.ErrUnexpectedEOF && err != io.EOF {
		return "", err
	}
	head = head[:n]
	has := func(at int, magic string) bool {
		return len(head) >= at+len(magic) && string(head[at:at+len(magic)]) == magic
	}
	switch {
	case has(0, elfMagic):
		return "elf", nil
	case has(bzAt, bzMagic):
		return "bzimage", nil
	case has(imageAt, imageMagic):
		return "image", nil
	}
	return "", nil
}

// checkKernel refuses a kernel that Firecracker would refuse later and with less of a reason.
func checkKernel(v version, path string) error {
	format, err := kernelFormat(path)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "the kernel cannot be read")
	}
	formats := kernelFormats(v)
	for _, f := range formats {
		if f == format {
			return nil
		}
	}
	what := format
	if what == "" {
		what = "none that is known"
	}
	return fault.New(fault.Precondition, "the kernel %s has the wrong format (%s): Firecracker %s boots %s", path, what, v, strings.Join(formats, " or ")).
		WithHint("banger setup --rebuild makes it again")
}
