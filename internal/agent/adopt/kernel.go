package adopt

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"os"
	"path/filepath"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"banger/internal/agent/identity"
)

// SetTime steps the wall clock and tells by how much; positive when it was behind. The monotonic clock goes on.
func SetTime(to time.Time) (time.Duration, error) {
	step := time.Until(to.Round(0))
	ts := unix.NsecToTimespec(to.UnixNano())
	if err := unix.ClockSettime(unix.CLOCK_REALTIME, &ts); err != nil {
		return 0, fmt.Errorf("set the clock: %w", err)
	}
	return step, nil
}

// StepTime moves the wall clock, in one step of the kernel: nothing that holds up the caller makes it less exact.
func StepTime(by time.Duration) error {
	const second = int64(time.Second)
	ts := unix.Timex{Modes: unix.ADJ_SETOFFSET | unix.ADJ_NANO}
	// The fraction is never negative (adjtimex(2)): -0.3 s is -1 s and 0.7 s.
	whole, part := int64(by)/second, int64(by)%second
	if part < 0 {
		whole, part = whole-1, part+second
	}
	ts.Time.Sec, ts.Time.Usec = whole, part
	if _, err := unix.ClockAdjtime(unix.CLOCK_REALTIME, &ts); err != nil {
		return fmt.Errorf("step the clock: %w", err)
	}
	return nil
}

// poolInfo is struct rand_pool_info (linux/random.h) with its bytes.
type poolInfo struct {
	bits int32
	size int32
	buf  [maxEntropy]byte
}

const maxEntropy = 512

// addEntropy credits the bytes to the kernel and makes it use them at once, for programs too: those that draw
// numbers in the vDSO see the new generation.
func addEntropy(p []byte) error {
	p = p[:min(len(p), maxEntropy)]
	f, err := os.OpenFile("/dev/urandom", os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	info := poolInfo{bits: int32(8 * len(p)), size: int32(len(p))}
	copy(info.buf[:], p)
	if err := ioctl(f, unix.RNDADDENTROPY, unsafe.Pointer(&info)); err != nil {
		return fmt.Errorf("add entropy: %w", err)
	}
	if err := ioctl(f, unix.RNDRESEEDCRNG, nil); err != nil {
		return fmt.Errorf("reseed the random numbers: %w", err)
	}
	return nil
}

func ioctl(f *os.File, request uintptr, argument unsafe.Pointer) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, f.Fd(), request, uintptr(argument)); errno != 0 {
		return errno
	}
	return nil
}

const kernelBootID = "/proc/sys/kernel/random/boot_id"

// newBootID gives programs another boot id: a file mounted over the kernel's, which cannot be changed. The mount
// propagates into the name spaces of services.
func newBootID(dir string) error {
	path := filepath.Join(dir, "boot_id")
	// In place: it may be mounted. Texts of one length are never seen half written.
	if err := identity.File(dir, "boot_id", newUUID()+"\n", 0o444); err != nil {
		return err
	}
	mounted, err := sameFile(path, kernelBootID)
	if err != nil || mounted {
		return err
	}
	if err := unix.Mount(path, kernelBootID, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("mount the new boot id: %w", err)
	}
	return nil
}

func sameFile(a, b string) (bool, error) {
	first, err := os.Stat(a)
	if err != nil {
		return false, err
	}
	second, err := os.Stat(b)
	if err != nil {
		return false, err
	}
	return os.SameFile(first, second), nil
}

// newUUID returns a random one (RFC 9562 section 5.4).
func newUUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// resizeExt4 is EXT4_IOC_RESIZE_FS of fs/ext4/ext4.h: _IOW('f', 16, __u64).
const resizeExt4 = 0x40086610

// growAll grows the ext4 file systems that are mounted writable on the directories to the size of their disks.
func growAll(dirs []string) error {
	for _, dir := range dirs {
		if err := grow(dir); err != nil {
			return fmt.Errorf("grow the file system on %s: %w", dir, err)
		}
	}
	return nil
}

func grow(dir string) error {
	blockSize, err := writableExt4(dir)
	if blockSize == 0 || err != nil {
		return err
	}
	device, size, err := diskOf(dir)
	if err != nil {
		return err
	}
	have, err := ext4Blocks(device)
	if err != nil {
		return err
	}
	// Even when there is nothing to grow the kernel would flush the journal, and with it the disk.
	blocks := uint64(size / blockSize)
	if blocks <= have {
		return nil
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	return ioctl(f, resizeExt4, unsafe.Pointer(&blocks))
}

// diskOf returns the device and the size in bytes of the disk on which dir lies.
func diskOf(dir string) (device string, size int64, err error) {
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return "", 0, err
	}
	// A link to its directory, which is named like the device.
	entry, err := filepath.EvalSymlinks(fmt.Sprintf("/sys/dev/block/%d:%d", unix.Major(st.Dev), unix.Minor(st.Dev)))
	if err != nil {
		return "", 0, err
	}
	b, err := os.ReadFile(filepath.Join(entry, "size"))
	if err != nil {
		return "", 0, err
	}
	var sectors int64
	if _, err := fmt.Sscan(string(b), &sectors); err != nil {
		return "", 0, fmt.Errorf("%s: %w", entry, err)
	}
	return filepath.Join("/dev", filepath.Base(entry)), sectors * 512, nil
}

// ext4Blocks reads from a disk how many blocks its file system has (Documentation/filesystems/ext4/super.rst).
func ext4Blocks(device string) (uint64, error) {
	const superblock, low, magic, high = 1024, 0x4, 0x38, 0x150
	f, err := os.Open(device)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	b := make([]byte, 1024)
	if _, err := f.ReadAt(b, superblock); err != nil {
		return 0, err
	}
	if binary.LittleEndian.Uint16(b[magic:]) != unix.EXT4_SUPER_MAGIC {
		return 0, fmt.Errorf("%s holds no ext4", device)
	}
	return uint64(binary.LittleEndian.Uint32(b[low:])) | uint64(binary.LittleEndian.Uint32(b[high:]))<<32, nil
}
