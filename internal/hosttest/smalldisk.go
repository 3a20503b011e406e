package hosttest

import (
	"errors"
	"fmt"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"

	"banger/internal/hosttest/need"
)

// SmallDisk mounts a tmpfs of so many bytes in a mount namespace of the test's own thread, and returns its directory. Only that
// thread sees it.
func SmallDisk(t *testing.T, bytes int64) string {
	t.Helper()
	need.Root(t)
	dir := t.TempDir()
	runtime.LockOSThread() // for good: the thread ends with the test, and its namespace with it
	if err := errors.Join(unix.Unshare(unix.CLONE_NEWNS), unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, fmt.Sprintf("size=%d", bytes)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
	return dir
}
