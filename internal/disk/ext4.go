package disk

import (
	"context"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/google/uuid"

	"banger/internal/fault"
	"banger/internal/fileio"
	"banger/internal/system"
)

const (
	// MinExt4 is the smallest file system CreateExt4 makes: below it the journal does not fit.
	MinExt4 = 64 << 20

	e2fsprogs   = "e2fsprogs"
	toolTimeout = 5 * time.Minute

	// seedFormat is part of a seed's file name: raise it when the options of mke2fs change.
	seedFormat = 2
)

// makingTime is when the file systems that we make were made, as they say themselves: the same bytes come of the same content.
const makingTime = 1_262_304_000 // 2010-01-01; programs of e2fsprogs take an earlier clock for broken

// namespace begins the UUIDs of our file systems, which are derived from their content (RFC 9562, version 5).
var namespace = uuid.MustParse("7d2c24a5-5e4a-4f0f-9d0b-6a1f5f8f1a52")

// timeStandsStill is the environment in which programs of e2fsprogs take seconds (Unix) for the time.
func timeStandsStill(seconds int64) []string {
	now := strconv.FormatInt(seconds, 10)
	return append(os.Environ(), "E2FSPROGS_FAKE_TIME="+now, "E2FSCK_TIME="+now)
}

// content is what a new file system is filled with.
type content struct {
	dir string
	sum []byte // over all that is in it
}

// CreateExt4 makes path a sparse file of size bytes with an empty ext4 in it, at most 16 bytes of
// label. It has a journal; the journal and the inode tables count as zeroed, as the holes of a new file
// read as zeros, so neither we nor the guest's kernel write them. The same size and label give the same bytes, and so
// the same UUID.
func CreateExt4(ctx context.Context, path string, size int64, label string) error {
	return makeExt4(ctx, path, size, label, nil)
}

// makeExt4 fills the file system, unless of is nil.
func makeExt4(ctx context.Context, path string, size int64, label string, of *content) error {
	if size < MinExt4 {
		return fault.New(fault.Usage, "a disk of %d bytes is too small, the least is %d", size, int64(MinExt4))
	}
	mke2fs, err := system.Find("mke2fs", e2fsprogs)
	if err != nil {
		return err
	}
	return atomically(path, func(t *os.File) error {
		if err := t.Truncate(size); err != nil {
			return fault.Wrap(fault.Usage, err, "cannot make a file of %d bytes", size)
		}
		name := fmt.Sprintf("%s %d ", label, size)
		var fill []string
		if of != nil {
			dir, err := filepath.Abs(of.dir)
			if err != nil {
				return err
			}
			name += hex.EncodeToString(of.sum)
			fill = []string{"-d", dir}
		}
		args := []string{
			"-q", "-F", "-t", "ext4", "-m", "0", "-J", "size=" + strconv.FormatInt(journalMiB(size), 10), "-L", label,
			"-U", uuid.NewSHA1(namespace, []byte(name)).String(),
			// Of files on the host only the content is copied: attributes there are the host's.
			"-E", "nodiscard,no_copy_xattrs,assume_storage_prezeroed=1,lazy_itable_init=1,root_owner=0:0,hash_seed=" +
				uuid.NewSHA1(namespace, []byte(name+" hash seed")).String(),
		}
		_, err := runOn(ctx, t.Name(), system.Command{Path: mke2fs, Args: append(args, fill...), Env: timeStandsStill(makingTime)})
		return toolFault(err, path)
	})
}

// runOn runs a program of e2fsprogs on the file at path. It names the file from its directory, as these
// programs take what is behind a question mark in a path for options.
func runOn(ctx context.Context, path string, c system.Command) ([]byte, error) {
	c.Dir, c.Args = filepath.Dir(path), append(c.Args, "./"+filepath.Base(path))
	if c.Timeout == 0 {
		c.Timeout = toolTimeout
	}
	return system.Run(ctx, c)
}

// journalMiB keeps the journal small: a guest that writes fills all of it on the host's disk.
func journalMiB(size int64) int64 {
	return min(32, max(4, size>>26))
}

// toolFault tells a full disk from other failures of a program, which only says so in words.
func toolFault(err error, path string) error {
	if err == nil || !strings.Contains(err.Error(), "No space left on device") {
		return err
	}
	return fault.Wrap(fault.Precondition, err, "disk full while writing %s", path).
		WithHint("free some space in %s", whereRoom(path))
}

// CloneSeed makes dst a sparse file of size bytes with an empty ext4 in it, by cloning one that
// is kept in seedsDir and made when it is missing. It takes some milliseconds. All clones of one
// seed have the same file system UUID.
func CloneSeed(ctx context.Context, seedsDir, dst string, size int64, label string) error {
	seed := filepath.Join(seedsDir, fmt.Sprintf("%s-%d-v%d.ext4", label, size, seedFormat))
	if !whole(seed, size) {
		if err := makeSeed(ctx, seed, size, label); err != nil {
			return err
		}
	}
	return CloneFile(ctx, dst, seed)
}

// whole tells whether a seed can be believed: a crash of the host can cut a file short.
func whole(seed string, size int64) bool {
	info, err := os.Stat(seed)
	if err != nil || info.Size() != size {
		return false
	}
	have, _, err := readSuperblock(seed)
	return err == nil && have == size
}

func makeSeed(ctx context.Context, seed string, size int64, label string) error {
	dir := filepath.Dir(seed)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot make directory %s", dir)
	}
	removeLeftovers(dir)
	own, err := os.MkdirTemp(dir, temporaryPrefix)
	if err != nil {
		return spaceFault(err, seed)
	}
	defer func() { _ = os.RemoveAll(own) }()
	made := filepath.Join(own, "seed")
	if err := CreateExt4(ctx, made, size, label); err != nil {
		return err
	}
	if err := fileio.Flush(made); err != nil {
		return spaceFault(err, seed)
	}
	// Another caller may have been quicker. Both seeds are good and a rename replaces in one step,
	// so that a clone that is being made of the other one is not disturbed.
	return os.Rename(made, seed)
}

// leftoverAge is how old a temporary entry must be to have lost its maker.
const leftoverAge = time.Hour

func removeLeftovers(dir string) {
	found, _ := filepath.Glob(filepath.Join(dir, temporaryPrefix+"*"))
	for _, path := range found {
		if info, err := os.Stat(path); err == nil && time.Since(info.ModTime()) > leftoverAge {
			_ = os.RemoveAll(path) // tried again next time
		}
	}
}

// GrowExt4 makes the file at path and the ext4 in it size bytes long. No machine may use it. The same
// size is a success, a smaller one a Usage fault. It may be called again after a crash.
func GrowExt4(ctx context.Context, path string, size int64) error {
	have, mounts, err := readSuperblock(path)
	if err != nil {
		return err
	}
	size -= size % 4096
	switch {
	case size == have:
		return nil
	case size < have:
		return fault.New(fault.Usage, "disk %s has %d bytes and cannot shrink to %d", filepath.Base(path), have, size)
	}
	if mounts > 0 { // resize2fs wants a checked one; a new clone needs no check
		if err := checkExt4(ctx, path, nil); err != nil {
			return err
		}
	}
	resize2fs, err := system.Find("resize2fs", e2fsprogs)
	if err != nil {
		return err
	}
	info, err := os.Stat(path)
	if err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot grow disk %s", path)
	}
	if info.Size() < size {
		if err := os.Truncate(path, size); err != nil {
			return fault.Wrap(fault.Usage, err, "cannot make disk %s %d bytes long", path, size)
		}
	}
	_, err = runOn(ctx, path, system.Command{Path: resize2fs})
	return toolFault(err, path)
}

// ErrDamaged is in the chain of errors about a file system that cannot be repaired safely.
var ErrDamaged = errors.New("the file system is damaged")

// checkExt4 replays the journal and repairs what is safe to repair.
func checkExt4(ctx context.Context, path string, env []string) error {
	e2fsck, err := system.Find("e2fsck", e2fsprogs)
	if err != nil {
		return err
	}
	_, first := runOn(ctx, path, system.Command{Path: e2fsck, Args: []string{"-fp"}, Env: env})
	if first == nil {
		return nil
	}
	// Exit code 1 says that something was mended; then a second look finds nothing.
	if _, err := runOn(ctx, path, system.Command{Path: e2fsck, Args: []string{"-fn"}, Env: env}); err != nil {
		return fault.Wrap(fault.Precondition, errors.Join(ErrDamaged, first), "disk %s", path).
			WithHint("repair it with: e2fsck -f %s", path)
	}
	return nil
}

// superblock reads the superblock of the ext4 at path. Offsets in it are from the kernel's Documentation/filesystems/ext4/super.rst.
func superblock(path string) (b [1024]byte, err error) {
	f, err := os.Open(path)
	if err != nil {
		return b, fault.Wrap(fault.Unexpected, err, "cannot read disk %s", path)
	}
	defer func() { _ = f.Close() }()
	if _, err := f.ReadAt(b[:], 1024); err != nil {
		return b, fault.Wrap(fault.Unexpected, err, "cannot read disk %s", path)
	}
	if binary.LittleEndian.Uint16(b[0x38:]) != 0xEF53 {
		return b, fault.New(fault.Precondition, "disk %s holds no ext4 file system", path)
	}
	return b, nil
}

// readSuperblock returns the size in bytes of the ext4 at path and how often it was mounted.
func readSuperblock(path string) (size int64, mounts int, err error) {
	b, err := superblock(path)
	if err != nil {
		return 0, 0, err
	}
	blocks := int64(binary.LittleEndian.Uint32(b[0x4:]))
	if binary.LittleEndian.Uint32(b[0x60:])&0x80 != 0 { // INCOMPAT_64BIT
		blocks |= int64(binary.LittleEndian.Uint32(b[0x150:])) << 32
	}
	return blocks << (10 + binary.LittleEndian.Uint32(b[0x18:])), int(binary.LittleEndian.Uint16(b[0x34:])), nil
}

// CompactExt4 makes the ext4 at path what a read-only disk needs: checked, without a journal, and no longer
// than what is in it. The same file becomes the same bytes whenever it is done.
func CompactExt4(ctx context.Context, path string) error {
	at, err := lastTouched(path)
	if err != nil {
		return err
	}
	env := timeStandsStill(at)
	if err := checkExt4(ctx, path, env); err != nil {
		return err
	}
	tune2fs, err := system.Find("tune2fs", e2fsprogs)
	if err != nil {
		return err
	}
	if _, err := runOn(ctx, path, system.Command{Path: tune2fs, Args: []string{"-f", "-O", "^has_journal"}, Env: env}); err != nil {
		return toolFault(err, path)
	}
	if err := checkExt4(ctx, path, env); err != nil {
		return err
	}
	resize2fs, err := system.Find("resize2fs", e2fsprogs)
	if err != nil {
		return err
	}
	if _, err := runOn(ctx, path, system.Command{Path: resize2fs, Args: []string{"-M"}, Timeout: 2 * toolTimeout, Env: env}); err != nil {
		return toolFault(err, path)
	}
	size, _, err := readSuperblock(path)
	if err != nil {
		return err
	}
	if err := os.Truncate(path, size); err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot shorten %s", path)
	}
	return nil
}

// lastTouched is the latest time that the ext4 at path tells of itself, in seconds (Unix).
func lastTouched(path string) (int64, error) {
	b, err := superblock(path)
	if err != nil {
		return 0, err
	}
	latest := int64(makingTime)
	for _, at := range []int{0x2c, 0x30, 0x40, 0x108} { // s_mtime, s_wtime, s_lastcheck, s_mkfs_time
		latest = max(latest, int64(binary.LittleEndian.Uint32(b[at:])))
	}
	return latest, nil
}
