package qemu_test

import (
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/vishvananda/netlink"

	agentv1 "banger/api/agent/v1"
	"banger/internal/guest"
	"banger/internal/hosttest"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/qemu"
)

// toolSource loads modules, shows files and sets a network device's address.
const toolSource = `package main

import (
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"syscall"
	"unsafe"
)

func must(err error) {
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

func load(name string) {
	must(filepath.WalkDir("/lib/modules", func(path string, _ fs.DirEntry, err error) error {
		if err != nil || filepath.Base(path) != name {
			return err
		}
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		empty := []byte{0}
		const finitModule = 313
		if _, _, e := syscall.Syscall(finitModule, f.Fd(), uintptr(unsafe.Pointer(&empty[0])), 0); e != 0 {
			return e
		}
		return nil
	}))
}

func setAddress(device, address string) {
	mac, err := net.ParseMAC(address)
	must(err)
	fd, err := syscall.Socket(syscall.AF_INET, syscall.SOCK_DGRAM, 0)
	must(err)
	var r struct {
		name   [16]byte
		family uint16
		mac    [22]byte
	}
	copy(r.name[:], device)
	r.family = 1 // ARPHRD_ETHER
	copy(r.mac[:], mac)
	if _, _, e := syscall.Syscall(syscall.SYS_IOCTL, uintptr(fd), 0x8924, uintptr(unsafe.Pointer(&r))); e != 0 {
		must(e) // SIOCSIFHWADDR
	}
}

func main() {
	switch os.Args[1] {
	case "load":
		for _, name := range os.Args[2:] {
			load(name)
		}
	case "cat":
		text, err := os.ReadFile(os.Args[2])
		must(err)
		os.Stdout.Write(text)
	case "mac":
		setAddress(os.Args[2], os.Args[3])
	}
}
`

const (
	savedMAC = "02:00:00:00:00:01"
	ownMAC   = "02:00:00:00:00:02"
)

// TestRestoredDevices restores a machine with another TAP device, another MAC and a disk that has another path
// and has grown.
func TestRestoredDevices(t *testing.T) {
	kernel := testKernel(t)
	initramfs := withModules(t, testInitramfs(t, toolSource), kernel)
	hosttest.NetNS(t)
	d := qemu.New(qemu.Options{})
	machine := func(name, mac string, diskBytes int64) vmm.Machine {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, name+".img"), make([]byte, diskBytes), 0o600); err != nil {
			t.Fatal(err)
		}
		addTAP(t, "tap-"+name)
		return vmm.Machine{
			ID: vm.ID("0a1b2c3d"), Name: name, Dir: dir, CPUs: 1, MemoryBytes: 256 << 20,
			Kernel: kernel, Initramfs: initramfs, Cmdline: []string{"quiet"},
			Disks: []vmm.Disk{{Role: "work", Path: name + ".img"}}, NICs: []vmm.NIC{{TAP: "tap-" + name, MAC: mac}},
		}
	}
	first := machine("first", savedMAC, 1<<20)
	saved := t.TempDir()
	first.MemoryFile = filepath.Join(saved, vmm.SavedMemory)
	r, err := d.Start(t.Context(), first)
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, r)
	say(t, r, "tool", "load", "virtio_blk.ko", "failover.ko", "net_failover.ko", "virtio_net.ko")
	await(t, r, "2048", "tool", "cat", "/sys/block/vda/size")
	await(t, r, savedMAC, "tool", "cat", "/sys/class/net/eth0/address")
	saveAndStop(t, r, saved)

	second := machine("second", ownMAC, 3<<20)
	second.Kernel, second.Initramfs = "/no/longer/there", "/no/longer/there"
	second.DiskRate = 50 << 20 // which the first one had not
	r, err = d.Restore(t.Context(), second, saved)
	if err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, r)
	await(t, r, "6144", "tool", "cat", "/sys/block/vda/size")
	if got := say(t, r, "tool", "cat", "/sys/class/net/eth0/address"); got != savedMAC {
		t.Errorf("the address is %s at first", got)
	}
	say(t, r, "tool", "mac", "eth0", ownMAC)
	again := t.TempDir()
	saveAndStop(t, r, again)
	if r, err = d.Restore(t.Context(), second, again); err != nil {
		t.Fatal(err)
	}
	stopAtEnd(t, r)
	if got := say(t, r, "tool", "cat", "/sys/class/net/eth0/address"); got != ownMAC {
		t.Errorf("the address that the guest set became %s", got)
	}
}

// withModules appends the modules that lie beside the kernel.
func withModules(t *testing.T, initramfs, kernel string) string {
	t.Helper()
	var all []byte
	for _, path := range []string{initramfs, filepath.Join(filepath.Dir(kernel), "boot-modules.cpio")} {
		text, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, text...)
		all = append(all, make([]byte, -len(all)&511)...)
	}
	path := filepath.Join(t.TempDir(), "initramfs.img")
	if err := os.WriteFile(path, all, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func addTAP(t *testing.T, name string) {
	t.Helper()
	link := &netlink.Tuntap{LinkAttrs: netlink.LinkAttrs{Name: name}, Mode: netlink.TUNTAP_MODE_TAP}
	if err := netlink.LinkAdd(link); err != nil {
		t.Fatal(err)
	}
	if err := netlink.LinkSetUp(link); err != nil {
		t.Fatal(err)
	}
}

func stopAtEnd(t *testing.T, r vmm.Running) {
	t.Cleanup(func() {
		if err := r.Stop(context.Background()); err != nil {
			t.Error(err)
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
}

func saveAndStop(t *testing.T, r vmm.Running, dir string) {
	t.Helper()
	if err := r.(vmm.Pauser).Pause(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := r.(vmm.Saver).Save(t.Context(), dir); err != nil {
		t.Fatal(err)
	}
	if err := r.Stop(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// say runs a program in the guest and returns what it says.
func say(t *testing.T, r vmm.Running, argv ...string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	c := guest.NewClient(r.DialGuest)
	defer c.Close()
	stream, err := c.Exec(ctx)
	if err == nil {
		err = stream.Send(&agentv1.ExecRequest{Input: &agentv1.ExecRequest_Start{Start: &agentv1.ExecStart{Argv: argv}}})
	}
	if err == nil {
		err = stream.CloseRequest()
	}
	if err != nil {
		t.Fatal(err)
	}
	defer stream.CloseResponse()
	var out strings.Builder
	for {
		answer, err := stream.Receive()
		if errors.Is(err, io.EOF) {
			return strings.TrimSpace(out.String())
		}
		if err != nil {
			t.Fatalf("%q: %v", argv, err)
		}
		out.Write(answer.GetStdout())
		if e := answer.GetExited(); e != nil && e.GetCode() != 0 {
			t.Fatalf("%q: %v: %s", argv, e, out.String())
		}
	}
}

// await asks until the answer is want: the guest's own work takes a moment.
func await(t *testing.T, r vmm.Running, want string, argv ...string) {
	t.Helper()
	got := ""
	for range 50 {
		if got = say(t, r, argv...); got == want {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("%q: %q, want %q", argv, got, want)
}
