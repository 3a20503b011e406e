package qemu

import (
	"cmp"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strconv"
	"strings"

	"banger/internal/fault"
	"banger/internal/vmm"
)

// MonitorSocket is QEMU's monitor, in the machine's directory.
const MonitorSocket = "qmp.sock"

// Places on the PCI bus. They are fixed, so that devices keep their order and a restored machine
// finds its own again.
const (
	slotChannel   = 0x02
	slotRandom    = 0x03
	slotFirstNIC  = 0x04
	slotFirstDisk = 0x08
	slotsEnd      = 0x1f // q35's own bridge

	maxNICs  = slotFirstDisk - slotFirstNIC
	maxDisks = slotsEnd - slotFirstDisk
)

// platform is what differs between the architectures of hosts.
type platform struct {
	binary, debianPackage string
	machine               string
	softwareCPU           string
	softwareThreads       string // "multi", a thread for each CPU, unless the version at hand cannot do it
	kernelFormats         []string
	kernelArgs            []string
}

var platforms = map[string]platform{
	"amd64": {
		binary: "qemu-system-x86_64", debianPackage: "qemu-system-x86",
		// microvm lacks a timer to calibrate by and hangs at times without KVM. Without its disk
		// controllers, which nothing is connected to, q35 boots faster than pc.
		machine: "q35,usb=off,vmport=off,sata=off,smbus=off",
		// QEMU 7.2's cmpxchg16b corrupts flags: kernels panic at random in the slab allocator.
		softwareCPU: "max,-cx16",
		// An ELF kernel starts by PVH, without the firmware's loading and the guest's own
		// unpacking: 2 s less of 5 without KVM. The crypto self-tests cost another half.
		kernelFormats: []string{"elf", "bzimage"},
		kernelArgs:    []string{"console=ttyS0", "reboot=t", "panic=-1", "cryptomgr.notests"},
	},
	"arm64": {
		binary: "qemu-system-aarch64", debianPackage: "qemu-system-arm",
		machine: "virt,gic-version=max", softwareCPU: "max",
		kernelFormats: []string{"image"},
		kernelArgs:    []string{"console=ttyAMA0", "panic=-1"},
	},
}

// arguments returns QEMU's command line for m. The working directory is m.Dir.
func arguments(p platform, accelerator string, m vmm.Machine) ([]string, error) {
	accel, cpu := "tcg,thread="+cmp.Or(p.softwareThreads, "multi"), p.softwareCPU
	if accelerator == "kvm" {
		accel, cpu = "kvm", "host"
	}
	args := []string{
		"-name", m.Name,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-machine", p.machine, "-accel", accel, "-cpu", cpu,
		"-smp", strconv.Itoa(m.CPUs), "-m", fmt.Sprintf("%dK", m.MemoryBytes>>10),
		"-chardev", "socket,id=monitor,path=" + MonitorSocket + ",server=on,wait=off",
		"-mon", "chardev=monitor,mode=control",
		"-chardev", "file,id=serial,append=on,path=" + vmm.SerialLog,
		"-serial", "chardev:serial",
		"-chardev", "socket,id=agent,path=" + vmm.GuestSocket + ",server=on,wait=off",
		"-device", fmt.Sprintf("virtio-serial-pci,addr=%#x", slotChannel),
		"-device", "virtserialport,chardev=agent,name=" + vmm.ChannelPort,
		"-device", fmt.Sprintf("virtio-rng-pci,addr=%#x", slotRandom),
	}
	for i, n := range m.NICs {
		args = append(args,
			"-netdev", fmt.Sprintf("tap,id=net%d,ifname=%s,script=no,downscript=no", i, n.TAP),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=net%d,mac=%s,romfile=,addr=%#x", i, n.MAC, slotFirstNIC+i))
	}
	for i, d := range m.Disks {
		drive, err := blockdev(d)
		if err != nil {
			return nil, err
		}
		args = append(args, "-blockdev", drive,
			"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,write-cache=on,addr=%#x", d.Role, slotFirstDisk+i))
	}
	args = append(args, "-kernel", m.Kernel)
	if m.Initramfs != "" {
		args = append(args, "-initrd", m.Initramfs)
	}
	line := append(append([]string{}, p.kernelArgs...), m.Cmdline...)
	return append(args, "-append", strings.Join(line, " ")), nil
}

// blockdev describes a drive. A guest's flush reaches the disk (no-flush is off); what the guest trims
// becomes a hole. Read-only drives are locked for sharing, so that many machines use one root.
func blockdev(d vmm.Disk) (string, error) {
	type file struct {
		Driver   string `json:"driver"`
		Filename string `json:"filename"`
		AIO      string `json:"aio"`
	}
	text, err := json.Marshal(struct {
		Driver   string `json:"driver"`
		Node     string `json:"node-name"`
		ReadOnly bool   `json:"read-only"`
		Discard  string `json:"discard"`
		Cache    struct {
			Direct  bool `json:"direct"`
			NoFlush bool `json:"no-flush"`
		} `json:"cache"`
		File file `json:"file"`
	}{
		Driver: "raw", Node: d.Role, ReadOnly: d.ReadOnly, Discard: "unmap",
		File: file{Driver: "file", Filename: d.Path, AIO: "threads"},
	})
	return string(text), err
}

// checkMachine finds what QEMU's command line cannot say.
func checkMachine(m vmm.Machine) error {
	bad := func(format string, args ...any) error {
		return fault.New(fault.Usage, "machine %s: %s", m.Name, fmt.Sprintf(format, args...))
	}
	switch {
	case m.CPUs < 1:
		return bad("%d CPUs", m.CPUs)
	case m.MemoryBytes < 1<<20:
		return bad("%d bytes of memory", m.MemoryBytes)
	case len(m.NICs) > maxNICs:
		return bad("%d network interfaces, the most is %d", len(m.NICs), maxNICs)
	case len(m.Disks) > maxDisks:
		return bad("%d disks, the most is %d", len(m.Disks), maxDisks)
	case !filepath.IsAbs(m.Kernel):
		return bad("the kernel's path %q is not absolute", m.Kernel)
	}
	// QEMU splits its options at commas.
	words := []string{m.Name}
	for _, n := range m.NICs {
		words = append(words, n.TAP, n.MAC)
	}
	roles := map[string]bool{}
	for _, d := range m.Disks {
		if roles[d.Role] {
			return bad("two disks have the role %q", d.Role)
		}
		roles[d.Role] = true
		words = append(words, d.Role)
	}
	for _, w := range words {
		if w == "" || strings.ContainsAny(w, ",= \t\n") || strings.HasPrefix(w, "-") {
			return bad("%q cannot be a name", w)
		}
	}
	return nil
}
