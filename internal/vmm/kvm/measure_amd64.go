package kvm

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Calls and layouts of KVM on x86 (linux/kvm.h, asm/kvm.h).
const (
	kvmGetVCPUMmapSize     = 0xAE04
	kvmCreateVCPU          = 0xAE41
	kvmSetUserMemoryRegion = 0x4020AE46
	kvmRun                 = 0xAE80
	kvmGetRegs             = 0x8090AE81
	kvmSetRegs             = 0x4090AE82
	kvmGetSregs            = 0x8138AE83
	kvmSetSregs            = 0x4138AE84

	exitHLT = 5

	runImmediateExit = 1 // offsets in struct kvm_run
	runExitReason    = 8
)

type memoryRegion struct {
	slot, flags         uint32
	guestPhysical, size uint64
	userspace           uint64
}

type registers struct {
	rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp uint64
	r8, r9, r10, r11, r12, r13, r14, r15   uint64
	rip, rflags                            uint64
}

type segment struct {
	base                            uint64
	limit                           uint32
	selector                        uint16
	kind, present, dpl, db, s, l, g uint8
	avl, unusable, padding          uint8
}

type table struct {
	base  uint64
	limit uint16
	_     [3]uint16
}

type systemRegisters struct {
	cs, ds, es, fs, gs, ss, tr, ldt         segment
	gdt, idt                                table
	cr0, cr2, cr3, cr4, cr8, efer, apicBase uint64
	interrupts                              [4]uint64
}

// The guest counts ECX down to zero in 32-bit protected mode at privilege level 0, two instructions
// a turn, and halts.
var program = []byte{
	0x49,       // dec ecx
	0x75, 0xfd, // jnz to the dec
	0xf4, // hlt
}

const (
	turns       = 50_000_000 // some 20 ms on hardware
	perTurn     = 2
	attempts    = 2 // a busy host may take the processor away during one
	attemptTime = 100 * time.Millisecond
	codeAt      = 0x1000
	memorySize  = 0x2000
)

func measure(kvm, vm int) Result {
	var best Result
	for range attempts {
		r, err := attempt(kvm, vm, turns)
		if err != nil {
			return Result{Reason: fmt.Sprintf("%s cannot run a small guest: %v", Device, err)}
		}
		if best.Reason == "" && !best.Usable || r.Rate > best.Rate {
			best = r
		}
		if best.Usable {
			break
		}
	}
	return best
}

// vcpus numbers the virtual processors: each attempt has its own.
var vcpus atomic.Uint64

func attempt(kvm, vm int, turns uint64) (Result, error) {
	memory, err := unix.Mmap(-1, 0, memorySize, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		return Result{}, err
	}
	defer unix.Munmap(memory)
	copy(memory[codeAt:], program)
	region := memoryRegion{size: memorySize, userspace: uint64(uintptr(unsafe.Pointer(&memory[0])))}
	if _, err := ioctl(vm, kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&region))); err != nil {
		return Result{}, fmt.Errorf("memory: %w", err)
	}
	region.size = 0 // takes the memory back, so that the next attempt may set its own
	defer func() { _, _ = ioctl(vm, kvmSetUserMemoryRegion, uintptr(unsafe.Pointer(&region))) }()
	cpu, err := ioctl(vm, kvmCreateVCPU, uintptr(vcpus.Add(1)-1))
	if err != nil {
		return Result{}, fmt.Errorf("processor: %w", err)
	}
	defer unix.Close(cpu)
	size, err := ioctl(kvm, kvmGetVCPUMmapSize, 0)
	if err != nil {
		return Result{}, err
	}
	shared, err := unix.Mmap(cpu, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return Result{}, err
	}
	defer unix.Munmap(shared)
	if err := prepare(cpu, turns); err != nil {
		return Result{}, fmt.Errorf("registers: %w", err)
	}
	took, err := run(cpu, shared)
	if err != nil {
		return Result{}, err
	}
	var regs registers
	if _, err := ioctl(cpu, kvmGetRegs, uintptr(unsafe.Pointer(&regs))); err != nil {
		return Result{}, err
	}
	return verdict((turns-min(regs.rcx&0xffffffff, turns))*perTurn, took), nil
}

// prepare puts the processor into flat 32-bit protected mode, as a boot loader leaves it.
func prepare(cpu int, turns uint64) error {
	var s systemRegisters
	if _, err := ioctl(cpu, kvmGetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return err
	}
	code := segment{limit: 0xffffffff, selector: 8, kind: 11, present: 1, db: 1, s: 1, g: 1}
	data := code
	data.kind, data.selector = 3, 16
	s.cs, s.ds, s.es, s.fs, s.gs, s.ss = code, data, data, data, data, data
	s.cr0 |= 1 // protection enable
	if _, err := ioctl(cpu, kvmSetSregs, uintptr(unsafe.Pointer(&s))); err != nil {
		return err
	}
	regs := registers{rip: codeAt, rcx: turns, rflags: 2}
	_, err := ioctl(cpu, kvmSetRegs, uintptr(unsafe.Pointer(&regs)))
	return err
}

// run lets the guest run until it halts or its time is over.
func run(cpu int, shared []byte) (time.Duration, error) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	thread := unix.Gettid()
	begin := time.Now()
	var over atomic.Bool
	done := make(chan struct{})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		limit := time.NewTimer(attemptTime)
		defer limit.Stop()
		select {
		case <-limit.C:
		case <-done:
			return
		}
		over.Store(true)
		shared[runImmediateExit] = 1
		// The runtime's own preemption signal: it does nothing but interrupt the call.
		_ = unix.Tgkill(os.Getpid(), thread, unix.SIGURG)
	}()
	defer func() { close(done); <-stopped }()
	for {
		_, err := ioctl(cpu, kvmRun, 0)
		took := time.Since(begin)
		reason := *(*uint32)(unsafe.Pointer(&shared[runExitReason]))
		switch {
		case errors.Is(err, unix.EINTR):
			if over.Load() {
				return took, nil
			}
		case err != nil:
			return 0, fmt.Errorf("run: %w", err)
		case reason == exitHLT:
			return took, nil
		default:
			return 0, fmt.Errorf("it left the guest for reason %d", reason)
		}
	}
}
