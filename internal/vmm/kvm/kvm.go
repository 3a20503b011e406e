// Package kvm tells whether the host's KVM runs ordinary guest kernels at a usable speed. It does
// not trust names: a paravirtual KVM opens and creates VMs like any other, but emulates kernel-mode
// code instruction by instruction. So a throw-away VM runs a short loop against the clock.
package kvm

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Device is where the kernel offers KVM.
const Device = "/dev/kvm"

// usableRate is the least number of instructions a second that counts as hardware virtualisation.
// Measured: some 0.4 million on a paravirtual KVM, thousands of millions on hardware.
const usableRate = 200e6

// Result is what the probe found.
type Result struct {
	Usable bool
	Rate   float64 // kernel-mode instructions a second; 0 when it was not measured
	Reason string  // why it is not usable, for people; empty when it is
}

// Probed is Probe, measured once for the process.
var Probed = sync.OnceValue(Probe)

// Probe measures, for at most some 200 ms.
func Probe() Result {
	f, err := os.OpenFile(Device, os.O_RDWR, 0)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return Result{Reason: Device + " is not there: no hardware virtualisation, or its kernel module is not loaded"}
	case errors.Is(err, fs.ErrPermission):
		return Result{Reason: "no permission to open " + Device + ": add your user to the group kvm and log in again"}
	case err != nil:
		return Result{Reason: err.Error()}
	}
	defer f.Close()
	const apiVersion = 12 // the only one since Linux 2.6.22
	if v, err := ioctl(int(f.Fd()), kvmGetAPIVersion, 0); err != nil || v != apiVersion {
		return Result{Reason: fmt.Sprintf("%s speaks version %d of its interface, want %d (%v)", Device, v, apiVersion, err)}
	}
	vm, err := ioctl(int(f.Fd()), kvmCreateVM, 0)
	if err != nil {
		return Result{Reason: fmt.Sprintf("%s cannot create a VM: %v", Device, err)}
	}
	defer unix.Close(vm)
	return measure(int(f.Fd()), vm)
}

// The calls of KVM that all architectures share (linux/kvm.h).
const (
	kvmGetAPIVersion = 0xAE00
	kvmCreateVM      = 0xAE01
)

func ioctl(fd int, request, arg uintptr) (int, error) {
	r, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, arg)
	if errno != 0 {
		return -1, errno
	}
	return int(r), nil
}

// verdict judges a measured rate.
func verdict(instructions uint64, took time.Duration) Result {
	rate := float64(instructions) / max(took, time.Microsecond).Seconds()
	if rate >= usableRate {
		return Result{Usable: true, Rate: rate}
	}
	return Result{Rate: rate, Reason: fmt.Sprintf(
		"%s runs guest kernel code at %.1f million instructions a second", Device, rate/1e6)}
}
