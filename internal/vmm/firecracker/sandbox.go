package firecracker

import (
	"debug/elf"

	"golang.org/x/sys/unix"

	"banger/internal/system"
	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// maxFiles bounds Firecracker's open files, among them one for each connection to the guest, of which it takes 1023.
const maxFiles = 2048

// Where a program that is not linked statically, as upstream's is, has its libraries.
var libraries = []string{"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache"}

// confinement is all that Firecracker may use on the host, around its own filter of system calls: this machine's files
// and the devices that make one. saved is a directory to read, or "".
func confinement(binary string, m vmm.Machine, saved string) *system.Confinement {
	c := &system.Confinement{
		Execute: []string{binary},
		// Times in its log; on arm64 it tells the guest of the processors' caches.
		Read:    []string{"/etc/localtime", "/usr/share/zoneinfo", "/sys/devices/system/cpu", "/dev/urandom"},
		Write:   []string{m.Dir},
		Devices: []string{"/dev/kvm", "/dev/net/tun"},
		// A core would have the guest's memory in it.
		Limits: map[int]uint64{unix.RLIMIT_NOFILE: maxFiles, unix.RLIMIT_CORE: 0},
	}
	if saved != "" {
		c.Read = append(c.Read, saved)
	}
	if dynamic(binary) {
		c.Execute = append(c.Execute, libraries...)
	}
	for _, path := range []string{m.Kernel, m.Initramfs} {
		if path != "" {
			c.Read = append(c.Read, machine.Absolute(m.Dir, path))
		}
	}
	for _, d := range m.Disks {
		path := machine.Absolute(m.Dir, d.Path)
		if d.ReadOnly {
			c.Read = append(c.Read, path)
		} else {
			c.Write = append(c.Write, path)
		}
	}
	return c
}

// groupName is the control group of a machine's own.
func groupName(m vmm.Machine) string { return "banger-" + string(m.ID) }

// groupLimits are wide: they keep a Firecracker that somebody has taken over from taking the host, and its disks' pages
// in the host's cache count as its memory.
func groupLimits(m vmm.Machine) system.CgroupLimits {
	return system.CgroupLimits{
		MemoryHigh: m.MemoryBytes + m.MemoryBytes/4 + 256<<20, PIDs: m.CPUs + 32, CPUWeight: 100,
	}
}

// startInGroup starts the process in a control group of its own where there can be one.
func (d *Driver) startInGroup(m vmm.Machine, o system.StartOptions) (*system.Process, error) {
	group, err := system.NewCgroup(groupName(m), groupLimits(m))
	if err != nil {
		d.log.Warn("Firecracker has no control group of its own", "machine", m.Name, "error", err)
	}
	if group == nil {
		return system.Start(o)
	}
	defer group.Close()
	o.Cgroup = group
	p, err := system.Start(o)
	if err == nil {
		return p, nil
	}
	removeGroup(group.Name())
	d.log.Warn("Firecracker cannot be started in a control group of its own", "machine", m.Name, "error", err)
	o.Cgroup = nil
	return system.Start(o)
}

func removeGroup(dir string) {
	if dir != "" {
		system.RemoveCgroup(dir)
	}
}

// dynamic tells whether a program needs a loader and libraries.
func dynamic(binary string) bool {
	f, err := elf.Open(binary)
	if err != nil {
		return false
	}
	defer f.Close()
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return true
		}
	}
	return false
}
