package bench

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"time"

	"banger/internal/system"
)

// stock is the baseline: Debian's own kernel, initramfs and units on a plain ext4 disk, in a VMM set up
// as steadily as banger's own.
type stock struct {
	dir                    string
	kernel, initrd, rootFS string
}

// stockPackages is banger's default user land plus what makes Debian boot by itself.
var stockPackages = []string{
	"systemd", "systemd-sysv", "systemd-resolved", "udev", "dbus", "openssh-server", "iproute2", "ca-certificates", "sudo", "less",
	"procps", "curl", "linux-image-cloud-amd64", "initramfs-tools", "zstd",
}

const bootLimit = 4 * time.Minute

// makeStock bootstraps the baseline once and keeps it in the cache. It needs root, for the ownership of
// the files on the disk.
func makeStock(ctx context.Context, cache string) (stock, error) {
	s := stock{dir: filepath.Join(cache, "stock-1")}
	s.rootFS = filepath.Join(s.dir, "root.ext4")
	s.kernel, s.initrd = filepath.Join(s.dir, "vmlinuz"), filepath.Join(s.dir, "initrd.img")
	if _, err := os.Stat(s.rootFS); err == nil {
		return s, nil
	}
	if os.Getuid() != 0 {
		return s, fmt.Errorf("the baseline can only be made by root")
	}
	tree := filepath.Join(s.dir, "tree")
	if err := os.RemoveAll(s.dir); err != nil {
		return s, err
	}
	if err := os.MkdirAll(s.dir, 0o755); err != nil {
		return s, err
	}
	steps := []system.Command{
		{Path: "mmdebstrap", Timeout: 10 * time.Minute, Args: []string{
			"--variant=apt", "--include=" + strings.Join(stockPackages, ","),
			"--customize-hook=mkdir -p $1/etc/systemd/network; printf '[Match]\\nName=en*\\n[Network]\\nDHCP=yes\\n' >$1/etc/systemd/network/all.network",
			"--customize-hook=chroot $1 systemctl enable systemd-networkd",
			"--customize-hook=echo '/dev/vda / ext4 defaults 0 1' >$1/etc/fstab",
			"trixie", tree,
		}},
		{Path: "sh", Args: []string{"-c", "cp " + tree + "/boot/vmlinuz-* " + s.kernel + " && cp " + tree + "/boot/initrd.img-* " + s.initrd}},
		{Path: "mke2fs", Timeout: 5 * time.Minute, Args: []string{"-q", "-t", "ext4", "-d", tree, s.rootFS + ".new", "4G"}},
	}
	for _, c := range steps {
		if _, err := system.Run(ctx, c); err != nil {
			return s, fmt.Errorf("make the baseline: %w", err)
		}
	}
	if err := os.RemoveAll(tree); err != nil {
		return s, err
	}
	return s, os.Rename(s.rootFS+".new", s.rootFS)
}

// boot starts the baseline and returns the time from process start to the SSH banner. What the guest
// writes is dropped, so that each boot is a first one.
func (s stock) boot(ctx context.Context, e emulation, cpus int, memoryMiB int) (time.Duration, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return 0, err
	}
	address := listener.Addr().String()
	listener.Close()
	qemu, err := system.Find("qemu-system-x86_64", "qemu-system-x86")
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	p, err := system.Start(system.StartOptions{
		Path: qemu, Dir: s.dir, Log: filepath.Join(s.dir, "vmm.log"), NewSession: true, // as VMs have it: see onBridge
		Args: []string{
			"-M", "q35", "-accel", e.accel, "-cpu", e.cpu, "-smp", fmt.Sprint(cpus), "-m", fmt.Sprint(memoryMiB),
			"-nodefaults", "-display", "none", "-no-reboot", "-serial", "file:serial.log",
			"-kernel", "vmlinuz", "-initrd", "initrd.img", "-append", "root=/dev/vda ro console=ttyS0 quiet " + e.kernelArgs,
			"-drive", "file=root.ext4,format=raw,if=virtio,snapshot=on",
			"-netdev", "user,id=n0,restrict=on,hostfwd=tcp:" + address + "-:22", "-device", "virtio-net-pci,netdev=n0",
			"-device", "virtio-rng-pci",
		},
	})
	if err != nil {
		return 0, err
	}
	defer func() {
		_ = p.Signal(killSignal)
		<-p.Done()
		_ = p.Close()
	}()
	ctx, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	if err := awaitBanner(ctx, address); err != nil {
		return 0, fmt.Errorf("stock boot, console in %s: %w", filepath.Join(s.dir, "serial.log"), err)
	}
	return time.Since(begin), nil
}

// emulation is how QEMU runs a guest's CPUs.
type emulation struct{ accel, cpu, kernelArgs string }

var (
	accelWord = regexp.MustCompile(`-accel '?([^\s'\\]+)`)
	cpuWord   = regexp.MustCompile(`-cpu '?([^\s'\\]+)`)
	kernelArg = regexp.MustCompile(`clearcpuid=\d+|no_timer_check`) // without them a kernel does not boot every time
)

// emulationOf reads it off the command line of a machine of banger's, so that the baseline has the same.
func emulationOf(commandFile string) (emulation, error) {
	text, err := os.ReadFile(commandFile)
	if err != nil {
		return emulation{}, err
	}
	accel, cpu := accelWord.FindSubmatch(text), cpuWord.FindSubmatch(text)
	if accel == nil || cpu == nil {
		return emulation{}, fmt.Errorf("%s names no accelerator or CPU", commandFile)
	}
	args := kernelArg.FindAllString(string(text), -1)
	return emulation{string(accel[1]), string(cpu[1]), strings.Join(args, " ")}, nil
}

// awaitBanner returns when an SSH server at address has sent its identification string (RFC 4253, 4.2).
func awaitBanner(ctx context.Context, address string) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		if readBanner(ctx, address) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("no SSH banner from %s: %w", address, ctx.Err())
		case <-tick.C:
		}
	}
}

func readBanner(ctx context.Context, address string) bool {
	d := net.Dialer{Timeout: 2 * time.Second}
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return false
	}
	defer conn.Close()
	// A user-mode network accepts before the guest listens, so the answer is what counts.
	_ = conn.SetDeadline(time.Now().Add(5 * time.Second))
	line, err := bufio.NewReader(conn).ReadString('\n')
	return err == nil && strings.HasPrefix(line, "SSH-")
}
