package helper

import (
	"fmt"
	"log/slog"
	"os"
	"unsafe"

	"github.com/landlock-lsm/go-landlock/landlock"
	landlocksys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/psx"
)

// The only files this program opens once it serves.
const (
	tunDevice = "/dev/net/tun"
	ipForward = "/proc/sys/net/ipv4/ip_forward"
)

// confine gives up everything but its two capabilities and three files, for all threads and for good, and tells
// whether there is CAP_NET_ADMIN. Landlock is used as far as the kernel has it.
func confine(log *slog.Logger) (right bool, err error) {
	if _, _, e := psx.Syscall6(unix.SYS_PRCTL, unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0, 0); e != 0 {
		return false, fmt.Errorf("give up new privileges: %w", e)
	}
	if right, err = keepCapabilities(); err != nil {
		return false, err
	}
	version, err := landlocksys.LandlockGetABIVersion()
	if err != nil || version < 1 {
		log.Info("this kernel has no Landlock: access to files is not confined")
		return right, nil
	}
	holdOpen(ipForward, bridgeNFCall)
	err = landlock.V5.BestEffort().RestrictPaths(
		landlock.RWFiles(tunDevice).WithIoctlDev().IgnoreIfMissing(), landlock.RWFiles(ipForward).IgnoreIfMissing(),
		landlock.ROFiles(bridgeNFCall).IgnoreIfMissing(),
	)
	if err != nil {
		return false, fmt.Errorf("confine the access to files: %w", err)
	}
	return right, nil
}

// holdOpen keeps files open for good. Landlock knows a file by its inode, and that of a kernel setting is another one when
// the kernel has let go of it, as it does when memory is short: then the file would be refused.
func holdOpen(paths ...string) {
	for _, path := range paths {
		if f, err := os.Open(path); err == nil { // one that is missing is not allowed either
			held = append(held, f)
		}
	}
}

var held []*os.File // for ever: a file that nobody knows any more is closed

// kept are the capabilities that requests need: for devices and the packet filter, and for port 53.
const kept = 1<<unix.CAP_NET_ADMIN | 1<<unix.CAP_NET_BIND_SERVICE

// keepCapabilities drops all capabilities but those, and tells whether CAP_NET_ADMIN is there.
func keepCapabilities() (bool, error) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var have [2]unix.CapUserData // capabilities 0-31 and 32-63
	if err := unix.Capget(&header, &have[0]); err != nil {
		return false, fmt.Errorf("read capabilities: %w", err)
	}
	keep := have[0].Permitted & kept
	want := &[2]unix.CapUserData{{Effective: keep, Permitted: keep}}
	_, _, e := psx.Syscall3(unix.SYS_CAPSET, uintptr(unsafe.Pointer(&header)), uintptr(unsafe.Pointer(want)), 0)
	if e != 0 {
		return false, fmt.Errorf("drop capabilities: %w", e)
	}
	return keep&(1<<unix.CAP_NET_ADMIN) != 0, nil
}
