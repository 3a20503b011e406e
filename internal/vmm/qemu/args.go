package qemu

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
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
	slotBalloon   = 0x07
	slotFirstDisk = 0x08
	slotsEnd      = 0x1f // q35's own bridge

	maxNICs  = slotBalloon - slotFirstNIC
	maxDisks = slotsEnd - slotFirstDisk
)

// platform is what differs between the architectures of hosts.
type platform struct {
	binary, debianPackage string
	machine               string
	softwareCPU           string
	softwareCPUsBefore    []string // what softwareCPU was in earlier builds: what was saved with one of them fits
	softwareThreads       string   // "multi", a thread for each CPU, unless the version at hand cannot do it
	generation            bool     // the machine tells its kernel when it goes on as a copy, which then has new random numbers
	kernelFormats         []string
	kernelArgs            []string
	softwareKernelArgs    []string // more of them without KVM, for versions before 8.0
}

var platforms = map[string]platform{
	"amd64": {
		binary: "qemu-system-x86_64", debianPackage: "qemu-system-x86",
		// microvm lacks a timer to calibrate by and hangs at times without KVM. Without its disk
		// controllers, which nothing is connected to, q35 boots faster than pc.
		machine: "q35,usb=off,vmport=off,sata=off,smbus=off",
		// Without "enhanced rep movsb" Linux and Go copy eight bytes at a time, not one: each takes one turn of a loop that
		// QEMU translated.
		softwareCPU: "max,-erms,-fsrm", softwareCPUsBefore: []string{"max", "max,-cx16"},
		generation: true,
		// An ELF kernel starts by PVH, without the firmware's loading and the guest's own
		// unpacking: 2 s less of 5 without KVM. The crypto self-tests cost another half.
		//
		// A kernel tries whether its timer's interrupt arrives, and panics when a few have not come within tens of
		// milliseconds of the host's time. On a loaded host they do not, and the wiring is QEMU's: there is nothing to try.
		// Kernels that know KVM do without by themselves, on KVM.
		kernelFormats: []string{"elf", "bzimage"},
		kernelArgs:    []string{"console=ttyS0", "reboot=t", "panic=-1", "cryptomgr.notests", "no_timer_check"},
		// Programs and libraries lie at the same addresses in all processes, and are translated once.
		//
		// cmpxchg16b leaves flags behind that are none, when an interrupt comes right after it. The kernel,
		// whose slab allocator uses it all the time, panics at random: it is told that there is none (141 is
		// X86_FEATURE_CX16). Programs keep it: those made for x86-64-v2 do not run without.
		softwareKernelArgs: []string{"norandmaps", "clearcpuid=141"},
	},
	"arm64": {
		binary: "qemu-system-aarch64", debianPackage: "qemu-system-arm",
		machine: "virt,gic-version=max", softwareCPU: "max",
		kernelFormats: []string{"image"},
		kernelArgs:    []string{"console=ttyAMA0", "panic=-1"},
	},
}

// memory says where a machine's memory lives.
type memory struct {
	file   string // absolute or relative to the machine's directory; "" is ordinary memory
	shared bool   // what the guest writes goes to the file
}

// arguments returns QEMU's command line to boot m. The working directory is m.Dir.
func arguments(p platform, accelerator string, m vmm.Machine) ([]string, error) {
	args, err := devices(p, accelerator, m, memory{file: m.MemoryFile, shared: true})
	if err != nil {
		return nil, err
	}
	args = append(args, "-kernel", m.Kernel)
	if m.Initramfs != "" {
		args = append(args, "-initrd", m.Initramfs)
	}
	line := slices.Clone(p.kernelArgs)
	if accelerator != "kvm" {
		line = append(line, p.softwareKernelArgs...)
	}
	line = append(line, m.Cmdline...)
	return append(args, "-append", strings.Join(line, " ")), nil
}

// restoreArguments returns the command line that waits for m's saved state. The kernel is part of it.
func restoreArguments(p platform, accelerator string, m vmm.Machine, mem memory) ([]string, error) {
	args, err := devices(p, accelerator, m, mem)
	if err != nil {
		return nil, err
	}
	return append(args, "-incoming", "defer"), nil
}

// layout is a hash of what must be the same for saved state to fit: the devices and their places, without
// what may differ between the machines restored from one.
func layout(p platform, accelerator string, m vmm.Machine) (string, error) {
	m.ID, m.Name, m.DiskRate = "", "name", 0
	m.NICs, m.Disks = slices.Clone(m.NICs), slices.Clone(m.Disks)
	for i := range m.NICs {
		m.NICs[i] = vmm.NIC{TAP: "tap", MAC: "mac"}
	}
	for i := range m.Disks {
		m.Disks[i].Path = "path"
	}
	args, err := devices(p, accelerator, m, memory{})
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256([]byte(strings.Join(args, "\n")))
	return hex.EncodeToString(sum[:]), nil
}

// devices describes the machine without what it boots.
func devices(p platform, accelerator string, m vmm.Machine, mem memory) ([]string, error) {
	accel, cpu := "tcg,thread="+cmp.Or(p.softwareThreads, "multi"), p.softwareCPU
	if accelerator == "kvm" {
		accel, cpu = "kvm", "host"
	}
	ram, err := backend(m.MemoryBytes, mem)
	if err != nil {
		return nil, err
	}
	args := []string{
		"-name", m.Name,
		"-nodefaults", "-no-user-config", "-no-reboot", "-display", "none",
		"-object", ram,
		"-machine", p.machine + ",memory-backend=" + memoryID, "-accel", accel, "-cpu", cpu,
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
	if p.generation {
		args = append(args, "-device", "vmgenid,guid=auto")
	}
	for i, n := range m.NICs {
		args = append(args,
			"-netdev", fmt.Sprintf("tap,id=net%d,ifname=%s,script=no,downscript=no", i, n.TAP),
			"-device", fmt.Sprintf("virtio-net-pci,netdev=net%d,mac=%s,romfile=,addr=%#x", i, n.MAC, slotFirstNIC+i))
	}
	if m.Balloon {
		args = append(args, "-device", fmt.Sprintf("virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on,addr=%#x", slotBalloon))
	}
	for i, d := range m.Disks {
		drive, err := drive(d, m.DiskRate)
		if err != nil {
			return nil, err
		}
		args = append(append(args, drive...),
			"-device", fmt.Sprintf("virtio-blk-pci,drive=%s,write-cache=on%s,addr=%#x", d.Role, serial(m, d), slotFirstDisk+i))
	}
	return args, nil
}

// maxSerial is VIRTIO_BLK_ID_BYTES of linux/virtio_blk.h.
const maxSerial = 20

// serial is by what a guest's own disk says whose it is: a guest that was restored elsewhere finds another one there. A
// machine that others are restored from is nobody's.
func serial(m vmm.Machine, d vmm.Disk) string {
	text := string(m.ID) + "-" + d.Role
	if m.ID == "" || d.ReadOnly || m.MemoryFile != "" || len(text) > maxSerial {
		return ""
	}
	return ",serial=" + text
}

// memoryID names the memory in saved state, so it is the same wherever the memory lives.
const memoryID = "ram0"

// backend describes the memory. It is JSON because a path may hold a comma.
func backend(bytes int64, mem memory) (string, error) {
	type object struct {
		Type  string `json:"qom-type"`
		ID    string `json:"id"`
		Size  int64  `json:"size"`
		Path  string `json:"mem-path,omitempty"`
		Share bool   `json:"share"`
	}
	o := object{Type: "memory-backend-ram", ID: memoryID, Size: bytes >> 10 << 10}
	if mem.file != "" {
		o.Type, o.Path, o.Share = "memory-backend-file", mem.file, mem.shared
	}
	text, err := json.Marshal(o)
	return string(text), err
}

// drive describes a drive, and what it may carry in bytes a second. The outermost node has the role's name.
func drive(d vmm.Disk, rate int64) ([]string, error) {
	if rate == 0 {
		disk, err := blockdev(d, d.Role)
		return []string{"-blockdev", disk}, err
	}
	group, inner := "rate-"+d.Role, "disk-"+d.Role
	type limits struct {
		Bytes int64 `json:"bps-total"`
	}
	limit, err1 := json.Marshal(struct {
		Type   string `json:"qom-type"`
		ID     string `json:"id"`
		Limits limits `json:"limits"`
	}{"throttle-group", group, limits{rate}})
	disk, err2 := blockdev(d, inner)
	throttle, err3 := json.Marshal(struct {
		Driver   string `json:"driver"`
		Node     string `json:"node-name"`
		ReadOnly bool   `json:"read-only"`
		Discard  string `json:"discard"`
		Group    string `json:"throttle-group"`
		File     string `json:"file"`
	}{"throttle", d.Role, d.ReadOnly, "unmap", group, inner})
	return []string{"-object", string(limit), "-blockdev", disk, "-blockdev", string(throttle)}, errors.Join(err1, err2, err3)
}

// blockdev describes a disk as a node of that name. A guest's flush reaches the disk (no-flush is off); what the guest trims
// becomes a hole. Read-only drives are locked for sharing, so that many machines use one root.
func blockdev(d vmm.Disk, node string) (string, error) {
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
		Driver: "raw", Node: node, ReadOnly: d.ReadOnly, Discard: "unmap",
		File: file{Driver: "file", Filename: d.Path, AIO: "threads"},
	})
	return string(text), err
}

// checkBoot finds what cannot be booted.
func checkBoot(m vmm.Machine) error {
	if !filepath.IsAbs(m.Kernel) {
		return fault.New(fault.Usage, "machine %s: the kernel's path %q is not absolute", m.Name, m.Kernel)
	}
	return checkMachine(m)
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
	case m.NetRate != 0:
		return bad("QEMU cannot limit the network rate")
	case m.Balloon && m.MemoryFile != "":
		return bad("a balloon would punch holes into the memory file")
	case len(m.NICs) > maxNICs:
		return bad("%d network interfaces, the most is %d", len(m.NICs), maxNICs)
	case len(m.Disks) > maxDisks:
		return bad("%d disks, the most is %d", len(m.Disks), maxDisks)
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
