package kvm

import (
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/hosttest/need"
)

// TestGuestHalts: a loop that is short enough ends by its halt even where it is emulated.
func TestGuestHalts(t *testing.T) {
	f, err := os.OpenFile(Device, os.O_RDWR, 0)
	if err != nil {
		need.KVM(t)
		t.Fatal(err)
	}
	defer f.Close()
	vm, err := ioctl(int(f.Fd()), kvmCreateVM, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(vm)
	begin := time.Now()
	r, err := attempt(int(f.Fd()), vm, 1000)
	if err != nil || r.Rate == 0 || time.Since(begin) > attemptTime {
		t.Errorf("%+v, %v after %s", r, err, time.Since(begin))
	}
}
