// Package host holds the checks of the machine banger runs on: the programs it calls, KVM, the
// rights of its network helper, disk space and its own directories.
package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"banger/internal/bundle"
	"banger/internal/doctor"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/system"
)

// Free space in the state directory, bytes: below the first nothing can be built, below the second
// a few VMs fill the disk.
const (
	leastSpace  = 2 << 30
	decentSpace = 10 << 30
)

// keyring is where Debian's package debian-archive-keyring puts the keys of its archive.
const keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// Checks returns the checks of this host for the banger of p.
func Checks(p paths.Paths) []doctor.Check {
	return []doctor.Check{
		{Name: "firecracker", Run: checkFirecracker},
		program("qemu", qemuBinary, qemuPackage, "runs VMs where Firecracker cannot"),
		program("mke2fs", "mke2fs", "e2fsprogs", "makes the disks"),
		program("resize2fs", "resize2fs", "e2fsprogs", "grows the disks"),
		program("ssh", "ssh", "openssh-client", "enters VMs"),
		optional(program("mmdebstrap", "mmdebstrap", "mmdebstrap", "builds the default image")),
		{Name: "keyring", Run: checkKeyring, Hint: "apt install debian-archive-keyring"},
		{Name: "kvm", Run: func(context.Context) doctor.Result { return checkKVM("/dev/kvm", "/sys/module/kvm_pvm") }},
		{Name: "nethelper", Run: checkNetHelper, Hint: "build and install all of banger: make install"},
		{Name: "runtime", Run: checkRuntime, Hint: "see what is wrong: banger runtime verify"},
		{Name: "disk space", Run: func(context.Context) doctor.Result { return checkSpace(p.State) }},
		{Name: "directories", Run: func(context.Context) doctor.Result { return checkDirectories(p) }},
		{Name: "socket", Run: func(context.Context) doctor.Result { return checkSocket(p) }},
	}
}

func program(name, binary, debianPackage, what string) doctor.Check {
	return doctor.Check{Name: name, Run: func(context.Context) doctor.Result {
		path, err := system.Find(binary, debianPackage)
		if err != nil {
			r := doctor.Fail(err)
			r.Message += "; it " + what
			return r
		}
		return doctor.Good(path)
	}}
}

// checkFirecracker misses nothing: QEMU runs the VMs then. Whether it can run VMs here is in the daemon's own check.
func checkFirecracker(ctx context.Context) doctor.Result {
	path, err := system.Find("firecracker", "")
	if err != nil {
		return doctor.Note("neither in the runtime directory nor in PATH: unless config.toml names one, QEMU runs the VMs (get it: banger runtime install firecracker)")
	}
	out, err := system.Run(ctx, system.Command{Path: path, Args: []string{"--version"}, Timeout: doctor.Limit / 2})
	if err != nil {
		return doctor.Warn(path+" does not run: "+err.Error(), "banger runtime install firecracker")
	}
	first, _, _ := strings.Cut(string(out), "\n") // lines of its log may follow
	return doctor.Good(fmt.Sprintf("%s, which is %s", path, strings.Trim(fmt.Sprintf("%.60q", strings.TrimSpace(first)), `"`)))
}

// optional makes a warning of what is missing: VMs run without it.
func optional(c doctor.Check) doctor.Check {
	needed := c.Run
	c.Run = func(ctx context.Context) doctor.Result {
		r := needed(ctx)
		if r.Status == doctor.MissingStatus {
			r.Status = doctor.Warning
		}
		return r
	}
	return c
}

func checkKeyring(context.Context) doctor.Result {
	if _, err := os.Stat(keyring); err != nil {
		return doctor.Warn("Debian's archive keys are missing: the default image cannot be built", "")
	}
	return doctor.Good(keyring)
}

// checkKVM says what can be said without running anything; whether KVM is quick enough is for the
// drivers to measure. A module named kvm_pvm is paravirtual: it opens, but does not run ordinary kernels.
func checkKVM(device, pvmModule string) doctor.Result {
	f, err := os.OpenFile(device, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return doctor.Warn(device+" does not exist: VMs run in software emulation, about ten times slower",
			"switch virtualisation on in the firmware, or nested virtualisation in the hypervisor, and load kvm_intel or kvm_amd")
	case errors.Is(err, fs.ErrPermission):
		return doctor.Warn("no right to open "+device+": VMs run in software emulation",
			"sudo usermod -aG kvm $USER, then log in again")
	case err != nil:
		return doctor.Warn(err.Error()+": VMs run in software emulation", "")
	}
	_ = f.Close()
	if _, err := os.Stat(pvmModule); err == nil {
		return doctor.Warn(device+" opens, but is paravirtual (kvm_pvm): VMs run in software emulation",
			"nothing on this machine helps; one with hardware virtualisation is faster")
	}
	return doctor.Good(device + " opens")
}

func checkNetHelper(context.Context) doctor.Result {
	path, err := paths.Program("banger-nethelper")
	if err != nil {
		return doctor.Fail(err)
	}
	if os.Geteuid() == 0 {
		return doctor.Good(path + " (run by root)")
	}
	granted, err := hasCapabilities(path)
	if err != nil {
		return doctor.Fail(err)
	}
	if !granted {
		return doctor.Missing(path+" lacks the capabilities CAP_NET_ADMIN and CAP_NET_BIND_SERVICE", "sudo setcap cap_net_admin,cap_net_bind_service+ep "+path)
	}
	return doctor.Good(path + " has CAP_NET_ADMIN and CAP_NET_BIND_SERVICE")
}

// checkRuntime tells what the runtime directory has. Nothing in it is needed; what it names and has not is.
func checkRuntime(context.Context) doctor.Result {
	place, err := bundle.Here()
	if err != nil {
		return doctor.Fail(err)
	}
	b, err := bundle.Read(place.Dir)
	if err != nil {
		return doctor.Fail(err)
	}
	var names []string
	for _, p := range b.Parts() {
		if info, err := os.Stat(p.Path); err != nil || !info.Mode().IsRegular() {
			return doctor.Missing(p.Path+" (the "+p.Name+") is missing", "")
		}
		names = append(names, p.Name)
	}
	if len(names) == 0 {
		return doctor.Note("nothing in " + place.Dir)
	}
	return doctor.Good(place.Dir + " has " + strings.Join(names, ", "))
}

// hasCapabilities reads the file capabilities: struct vfs_cap_data of linux/capability.h, little-endian,
// a 32-bit header with the effective bit lowest, then the low half of the permitted set.
func hasCapabilities(path string) (bool, error) {
	buffer := make([]byte, 64)
	n, err := unix.Getxattr(path, "security.capability", buffer)
	if errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP) {
		return false, nil
	}
	if err != nil {
		return false, fault.Wrap(fault.Precondition, err, "cannot read the capabilities of %s", path)
	}
	return grantsCapabilities(buffer[:n]), nil
}

func grantsCapabilities(data []byte) bool {
	if len(data) < 8 {
		return false
	}
	effective := data[0]&1 == 1
	permitted := uint32(data[4]) | uint32(data[5])<<8 | uint32(data[6])<<16 | uint32(data[7])<<24
	const needed = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_BIND_SERVICE
	return effective && permitted&needed == needed
}

func checkSpace(dir string) doctor.Result {
	existing := nearestExisting(dir)
	var s unix.Statfs_t
	if err := unix.Statfs(existing, &s); err != nil {
		return doctor.Missing(fmt.Sprintf("cannot see how full the disk of %s is: %v", existing, err), "")
	}
	free := int64(s.Bavail) * s.Bsize
	text := fmt.Sprintf("%.1f GiB free for %s", float64(free)/(1<<30), dir)
	const hint = "free some space, or move the state directory with XDG_STATE_HOME"
	switch {
	case free < leastSpace:
		return doctor.Missing(text, hint)
	case free < decentSpace:
		return doctor.Warn(text, hint)
	}
	return doctor.Good(text)
}

func nearestExisting(dir string) string {
	for {
		if _, err := os.Stat(dir); err == nil || dir == filepath.Dir(dir) {
			return dir
		}
		dir = filepath.Dir(dir)
	}
}

// checkDirectories tells whether banger may write where it keeps its things, without making any.
func checkDirectories(p paths.Paths) doctor.Result {
	var bad []string
	for _, dir := range []string{p.Config, p.State, p.Cache, p.Runtime} {
		existing := nearestExisting(dir)
		info, err := os.Stat(existing)
		switch {
		case err != nil:
			bad = append(bad, err.Error())
		case !info.IsDir():
			bad = append(bad, existing+" is no directory")
		case unix.Access(existing, unix.W_OK|unix.X_OK) != nil:
			bad = append(bad, "no right to write in "+existing)
		}
	}
	if len(bad) > 0 {
		return doctor.Missing(strings.Join(bad, "; "), "mend their owner or mode, or choose others with the XDG_*_HOME variables")
	}
	return doctor.Good("state in " + p.State)
}

func checkSocket(p paths.Paths) doctor.Result {
	if err := paths.CheckSocket(p.Socket()); err != nil {
		return doctor.Fail(err)
	}
	return doctor.Good(p.Socket())
}
