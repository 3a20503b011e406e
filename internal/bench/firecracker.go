package bench

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"banger/internal/system"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/firecracker"
	"banger/internal/vmm/kvm"
)

const (
	fakeFirecracker = "banger-fake-firecracker" // beside banger's programs, built for the bench

	firecrackerMiB  = 128
	firecrackerRuns = 30
	manyMachines    = 20
)

// usable takes any KVM: the fake needs none, and how much memory a VMM takes does not depend on how fast it is.
func usable() kvm.Result { return kvm.Result{Usable: true} }

// drivers measures what banger's part of a start under Firecracker takes, with a fake one that does nothing slowly.
func (b *bench) drivers(ctx context.Context) error {
	fake, err := filepath.Abs(filepath.Join(b.bin, fakeFirecracker))
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bgr-bench-fc-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	kernel, err := b.kernel()
	if err != nil {
		return err
	}
	d := firecracker.New(firecracker.Options{Binary: fake, KVM: usable})
	if _, err := d.Caps(ctx); err != nil {
		return err
	}
	var bare, starts []float64
	for i := range firecrackerRuns {
		alone, err := seconds(func() error {
			_, err := system.Run(ctx, system.Command{Path: fake, Args: []string{"--version"}})
			return err
		})
		if err != nil {
			return err
		}
		var r vmm.Running
		took, err := seconds(func() (err error) { r, err = d.Start(ctx, machineIn(dir, kernel, i)); return err })
		if err != nil {
			return err
		}
		if err := r.Stop(ctx); err != nil {
			return err
		}
		bare, starts = append(bare, alone*1000), append(starts, took*1000)
	}
	b.add(measured("fake Firecracker --version", "ms", 0, bare...))
	b.add(measured("Firecracker driver: Start until the guest is started", "ms", 25, starts...))
	return b.driverMemory(ctx, d, dir, kernel)
}

// kernel is the one that the VMs of the bench boot.
func (b *bench) kernel() (string, error) {
	found, err := filepath.Glob(filepath.Join(b.state, "kernels", "*", "vmlinux"))
	if err != nil || len(found) == 0 {
		return "", fmt.Errorf("there is no kernel in %s (%v)", b.state, err)
	}
	return filepath.Abs(found[0])
}

// machineIn is a small machine without disks in a directory of its own.
func machineIn(dir, kernel string, i int) vmm.Machine {
	own := filepath.Join(dir, fmt.Sprint(i))
	_ = os.MkdirAll(own, 0o700) // a start without it fails
	return vmm.Machine{
		ID: vm.NewID(), Name: fmt.Sprintf("bench%d", i), Dir: own, CPUs: 1, MemoryBytes: firecrackerMiB << 20, Kernel: kernel,
	}
}

// driverMemory measures what this process, in the daemon's place, needs for each machine that it holds.
func (b *bench) driverMemory(ctx context.Context, d *firecracker.Driver, dir, kernel string) error {
	before := inUse()
	var all []vmm.Running
	defer func() {
		for _, r := range all {
			_ = r.Stop(context.WithoutCancel(ctx)) // the directory goes anyway, and the machine with it
		}
	}()
	for i := range manyMachines {
		r, err := d.Start(ctx, machineIn(dir, kernel, firecrackerRuns+i))
		if err != nil {
			return err
		}
		all = append(all, r)
	}
	each := float64(inUse()-before) / manyMachines / 1e6
	b.add(measured("Firecracker driver: memory for a running VM", "MB", 1, max(each, 0)))
	return nil
}

// inUse is what the heap and the stacks take, in bytes, after a collection.
func inUse() int64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return int64(m.HeapInuse + m.StackInuse)
}

// daemonMemory measures what a daemon needs for each VM that runs.
func (b *bench) daemonMemory(ctx context.Context) error {
	resident := func() (float64, error) {
		var status struct {
			PID int `json:"pid"`
		}
		if err := b.fake.banger(ctx, &status, "daemon", "status", "-o", "json"); err != nil {
			return 0, err
		}
		kib, err := statusField(fmt.Sprintf("/proc/%d/status", status.PID), "RssAnon")
		return float64(kib) * 1024 / 1e6, err
	}
	if err := b.fake.create(ctx, "first"); err != nil { // what the first one needs all of them use
		return err
	}
	before, err := resident()
	if err != nil {
		return err
	}
	var names []string
	for i := range manyMachines {
		names = append(names, fmt.Sprintf("mem%d", i))
		if err := b.fake.create(ctx, names[i]); err != nil {
			return err
		}
	}
	after, err := resident()
	if err != nil {
		return err
	}
	b.add(measured("bangerd: memory for a running VM", "MB", 1, max(0, (after-before)/manyMachines)))
	return b.fake.remove(ctx, append(names, "first")...)
}

// overhead measures what a real Firecracker takes beside its guest's memory, where there is one.
func (b *bench) overhead(ctx context.Context) error {
	if b.firecracker == "" {
		fmt.Fprintln(os.Stderr, "not measured: the memory of a real Firecracker (--firecracker names none)")
		return nil
	}
	kernel, err := b.kernel()
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bgr-bench-fc-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	r, err := firecracker.New(firecracker.Options{Binary: b.firecracker, KVM: usable}).Start(ctx, machineIn(dir, kernel, 0))
	if err != nil {
		return err
	}
	defer func() { _ = r.Stop(context.WithoutCancel(ctx)) }()
	if err := rest(ctx, 2*time.Second); err != nil {
		return err
	}
	f, err := os.Open(fmt.Sprintf("/proc/%d/smaps", r.Handle().PID))
	if err != nil {
		return err
	}
	defer f.Close()
	kib, err := besideGuest(f, firecrackerMiB<<10)
	if err != nil {
		return err
	}
	b.add(measured("Firecracker: memory beside the guest's", "MB", 0, float64(kib)*1024/1e6))
	return nil
}

// besideGuest sums up the Pss of mappings that are not the guest's memory, which is one of its size (proc_pid_smaps(5)).
// Sizes are in KiB.
func besideGuest(smaps io.Reader, guestKiB int64) (int64, error) {
	var sum, size int64
	lines := bufio.NewScanner(smaps)
	for lines.Scan() {
		var n int64
		switch name, value, _ := strings.Cut(lines.Text(), ":"); name {
		case "Size", "Pss":
			if _, err := fmt.Sscanf(value, "%d kB", &n); err != nil {
				return 0, fmt.Errorf("smaps: %q", lines.Text())
			}
			if name == "Size" {
				size = n
			} else if size < guestKiB {
				sum += n
			}
		}
	}
	return sum, lines.Err()
}
