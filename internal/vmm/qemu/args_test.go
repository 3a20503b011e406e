package qemu

import (
	"encoding/json"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"banger/internal/fault"
	"banger/internal/vmm"
)

func sample() vmm.Machine {
	return vmm.Machine{
		ID: "0a1b2c3d", Name: "web", Dir: "/vms/0a1b2c3d", CPUs: 2, MemoryBytes: 512 << 20,
		Kernel: "/kernels/k/vmlinux", Initramfs: "initramfs.img", Cmdline: []string{"quiet"},
		Disks: []vmm.Disk{{Role: "root", Path: "/images/a, b/root.ext4", ReadOnly: true}, {Role: "work", Path: "work.ext4"}},
		NICs:  []vmm.NIC{{TAP: "bgr-0a1b2c3d", MAC: "52:54:00:0a:1b:2c"}},
	}
}

// TestArguments is the whole command line: a change of it must be meant.
func TestArguments(t *testing.T) {
	const want = `-name web
-nodefaults
-no-user-config
-no-reboot
-display none
-object {"qom-type":"memory-backend-ram","id":"ram0","size":536870912,"share":false}
-machine q35,usb=off,vmport=off,sata=off,smbus=off,memory-backend=ram0
-accel tcg,thread=multi
-cpu max,-erms,-fsrm
-smp 2
-m 524288K
-chardev socket,id=monitor,path=qmp.sock,server=on,wait=off
-mon chardev=monitor,mode=control
-chardev file,id=serial,append=on,path=serial.log
-serial chardev:serial
-chardev socket,id=agent,path=guest.sock,server=on,wait=off
-device virtio-serial-pci,addr=0x2
-device virtserialport,chardev=agent,name=banger.agent.0
-device virtio-rng-pci,addr=0x3
-device vmgenid,guid=auto
-netdev tap,id=net0,ifname=bgr-0a1b2c3d,script=no,downscript=no
-device virtio-net-pci,netdev=net0,mac=52:54:00:0a:1b:2c,romfile=,addr=0x4
-blockdev {"driver":"raw","node-name":"root","read-only":true,"discard":"unmap","cache":{"direct":false,"no-flush":false},"file":{"driver":"file","filename":"/images/a, b/root.ext4","aio":"threads"}}
-device virtio-blk-pci,drive=root,write-cache=on,addr=0x8
-blockdev {"driver":"raw","node-name":"work","read-only":false,"discard":"unmap","cache":{"direct":false,"no-flush":false},"file":{"driver":"file","filename":"work.ext4","aio":"threads"}}
-device virtio-blk-pci,drive=work,write-cache=on,serial=0a1b2c3d-work,addr=0x9
-kernel /kernels/k/vmlinux
-initrd initramfs.img
-append console=ttyS0 reboot=t panic=-1 cryptomgr.notests no_timer_check norandmaps clearcpuid=141 quiet`
	args, err := arguments(platforms["amd64"], "tcg", sample())
	if err != nil {
		t.Fatal(err)
	}
	got := strings.ReplaceAll(strings.Join(args, " "), " -", "\n-")
	if got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
	withKVM, err := arguments(platforms["amd64"], "kvm", sample())
	if err != nil || !strings.Contains(strings.Join(withKVM, " "), "-accel kvm -cpu host") {
		t.Errorf("with KVM: %q, %v", withKVM, err)
	}
}

// TestLimitedArguments: each disk has a group of its own, in front of it a node of its role's name, and what was saved
// without limits fits to a machine with them.
func TestLimitedArguments(t *testing.T) {
	m := sample()
	m.DiskRate, m.Balloon = 100<<20, true
	args, err := arguments(platforms["amd64"], "tcg", m)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range [][]string{
		{"-object", `{"qom-type":"throttle-group","id":"rate-work","limits":{"bps-total":104857600}}`, "-blockdev"},
		{"-blockdev", `{"driver":"throttle","node-name":"work","read-only":false,"discard":"unmap","throttle-group":"rate-work","file":"disk-work"}`, "-device"},
		{"-blockdev", `{"driver":"throttle","node-name":"root","read-only":true,"discard":"unmap","throttle-group":"rate-root","file":"disk-root"}`, "-device"},
		{"-device", "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on,addr=0x7"},
	} {
		if !strings.Contains(strings.Join(args, "\n"), strings.Join(want, "\n")) {
			t.Errorf("no %q in %q", want, args)
		}
	}
	hash := func(m vmm.Machine) string {
		text, err := layout(platforms["amd64"], "tcg", m)
		if err != nil {
			t.Fatal(err)
		}
		return text
	}
	plain, limited, ballooned := sample(), sample(), sample()
	limited.DiskRate, ballooned.Balloon = 1<<20, true
	other := sample()
	other.ID, other.MemoryFile = "ffffffff", "memory"
	if hash(plain) != hash(other) {
		t.Error("whose disks they are is part of the layout")
	}
	if hash(plain) != hash(limited) || hash(plain) == hash(ballooned) {
		t.Error("a limit is part of the layout, or a balloon is none")
	}
}

func TestCheckMachine(t *testing.T) {
	if err := checkBoot(sample()); err != nil {
		t.Fatal(err)
	}
	for name, spoil := range map[string]func(*vmm.Machine){
		"no CPU":            func(m *vmm.Machine) { m.CPUs = 0 },
		"no memory":         func(m *vmm.Machine) { m.MemoryBytes = 0 },
		"relative kernel":   func(m *vmm.Machine) { m.Kernel = "vmlinux" },
		"option in name":    func(m *vmm.Machine) { m.Name = "web,process=x" },
		"option in TAP":     func(m *vmm.Machine) { m.NICs[0].TAP = "x,script=/tmp/y" },
		"empty MAC":         func(m *vmm.Machine) { m.NICs[0].MAC = "" },
		"network rate":      func(m *vmm.Machine) { m.NetRate = 1 << 20 },
		"shared balloon":    func(m *vmm.Machine) { m.Balloon, m.MemoryFile = true, "memory" },
		"same role":         func(m *vmm.Machine) { m.Disks[1].Role = "root" },
		"too many disks":    func(m *vmm.Machine) { m.Disks = make([]vmm.Disk, maxDisks+1) },
		"too many networks": func(m *vmm.Machine) { m.NICs = make([]vmm.NIC, maxNICs+1) },
	} {
		m := sample()
		spoil(&m)
		if err := checkBoot(m); fault.KindOf(err) != fault.Usage {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// TestDiskPathsAreData: whatever a path holds, QEMU reads it back as one file name.
func TestDiskPathsAreData(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		path := rapid.StringMatching(`[ -~]{1,40}`).Draw(t, "path")
		text, err := blockdev(vmm.Disk{Role: "root", Path: path}, "root")
		if err != nil {
			t.Fatal(err)
		}
		var back struct{ File struct{ Filename string } }
		if err := json.Unmarshal([]byte(text), &back); err != nil || back.File.Filename != path {
			t.Fatalf("%q became %q, %v", path, back.File.Filename, err)
		}
	})
}
