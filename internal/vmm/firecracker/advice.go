package firecracker

import (
	"strings"

	"banger/internal/fault"
)

// advice turns what Firecracker says into a kind and what to do. Its texts are no promise: short tokens are looked
// for in lower case, all of a row's, and the first row that fits counts.
type advice struct {
	tokens []string
	kind   fault.Kind
	hint   string
}

var advices = []advice{
	{[]string{"too many open connections"}, fault.Unexpected, "this is a bug of banger's: please report it"},
	{[]string{"unknown field"}, fault.Precondition, "this Firecracker is too old: see docs/firecracker.md"},
	// What KVM refuses shows at InstanceStart and load, where it is opened.
	{[]string{"kvm", "os error 13"}, fault.Precondition, "no permission to open /dev/kvm: add your user to the group kvm and log in again"},
	{[]string{"kvm", "os error 2)"}, fault.Precondition, "/dev/kvm is not there: load kvm_intel or kvm_amd, and switch virtualisation on in the firmware"},
	{[]string{"kvm", "os error 16"}, fault.Precondition, "another hypervisor has the processor: stop VirtualBox or VMware"},
	{[]string{"missing kvm capabilities"}, fault.Precondition, "this host's KVM cannot do it: use QEMU, banger vm create --vmm qemu"},
	{[]string{"error creating kvm object"}, fault.Precondition, "KVM cannot be used: see banger doctor"},
	{[]string{"tap", "os error 16"}, fault.Conflict, "another process uses the VM's network device: see banger doctor"},
	{[]string{"tap", "resource busy"}, fault.Conflict, "another process uses the VM's network device: see banger doctor"},
	{[]string{"ifreq"}, fault.Precondition, "the VM's network device cannot be used: see banger doctor"},
	{[]string{"invalid interface name"}, fault.Precondition, "the VM's network device cannot be used: see banger doctor"},
	{[]string{"tap"}, fault.Precondition, "the VM's network device is missing or another user's: see banger doctor"},
	{[]string{"/dev/net/tun"}, fault.Precondition, "your user may not open /dev/net/tun: see banger doctor"},
	{[]string{"mac address"}, fault.Conflict, "two network devices have one address: make the VM anew"},
	{[]string{"host-side unix socket"}, fault.Conflict, "a socket of another VMM is in the way: see banger doctor"},
	{[]string{"os error 98"}, fault.Conflict, "a socket of another VMM is in the way: see banger doctor"},
	{[]string{"os error 28"}, fault.Precondition, "free some space on this disk"},
	{[]string{"os error 27"}, fault.Precondition, "a limit on the size of files is in the way: see ulimit -f"},
	{[]string{"os error 12"}, fault.Precondition, "the host has too little free memory: give the VM less, or stop another one"},
	{[]string{"mmap region"}, fault.Precondition, "the host has too little free memory: give the VM less, or stop another one"},
	{[]string{"kernel file"}, fault.Precondition, "the kernel is missing or cannot be read: banger setup makes it again"},
	{[]string{"kernel image"}, fault.Precondition, "the kernel has the wrong format or is damaged: banger setup --rebuild makes it again"},
	{[]string{"elf magic"}, fault.Precondition, "the kernel has the wrong format or is damaged: banger setup --rebuild makes it again"},
	{[]string{"64-bit entry"}, fault.Precondition, "the kernel is for another architecture: banger setup --rebuild makes it again"},
	{[]string{"command line"}, fault.Usage, "the kernel's command line is too long: 2048 bytes in all"},
	{[]string{"initrd"}, fault.Precondition, "the initramfs is missing, or does not fit: give the VM more memory"},
	{[]string{"backing file", "os error 13"}, fault.Precondition, "your user cannot open a disk of this VM: see its owner and mode"},
	{[]string{"backing file", "os error 30"}, fault.Precondition, "a disk of this VM is on a read-only file system"},
	{[]string{"backing file"}, fault.Precondition, "a disk of this VM is missing: see banger doctor"},
	{[]string{"root block device already"}, fault.Unexpected, "this is a bug of banger's: please report it"},
	{[]string{"io engine"}, fault.Precondition, "the host's kernel is too old"},
	{[]string{"before starting"}, fault.Conflict, "the VM does not run yet"},
	{[]string{"after starting"}, fault.Conflict, "the VM runs already"},
	{[]string{"not allowed after configuring"}, fault.Unexpected, "this is a bug of banger's: please report it"},
	{[]string{"unavailable while running"}, fault.Conflict, "pause the VM first"},
	{[]string{"restore vcpus"}, fault.Precondition, "it was saved on another processor or host kernel: it can only be booted anew"},
	{[]string{"msr"}, fault.Precondition, "it was saved on another processor or host kernel: it can only be booted anew"},
	{[]string{"cpuid"}, fault.Precondition, "it was saved on another processor or host kernel: it can only be booted anew"},
	{[]string{"snapshot"}, fault.Precondition, "what was saved does not fit or is damaged: it can only be booted anew"},
	{[]string{"guest memory"}, fault.Precondition, "what was saved does not fit or is damaged: it can only be booted anew"},
	{[]string{"gsi"}, fault.Precondition, "the VM has too many devices"},
	{[]string{"device slot"}, fault.Precondition, "the VM has too many devices"},
	{[]string{"os error 13"}, fault.Precondition, "your user cannot open a file of this VM: see its owner and mode"},
}

// advise makes a fault of a refusal; its text is kept.
func advise(e *apiError) error {
	kind, hint := classify(e.Said)
	f := fault.Wrap(kind, e, "Firecracker refused")
	if hint == "" {
		return f
	}
	return f.WithHint("%s", hint)
}

// classify finds the advice for a text of Firecracker's; without one it is Unexpected.
func classify(text string) (fault.Kind, string) {
	text = strings.ToLower(text)
	for _, a := range advices {
		fits := true
		for _, token := range a.tokens {
			fits = fits && strings.Contains(text, token)
		}
		if fits {
			return a.kind, a.hint
		}
	}
	return fault.Unexpected, ""
}
