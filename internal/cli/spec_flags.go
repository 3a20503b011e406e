package cli

import (
	"bytes"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/crypto/ssh"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
	"banger/internal/vm"
)

// vmms are what --vmm takes.
var vmms = []string{"auto", "firecracker", "qemu"}

// specOptions are the flags that say what a new VM is like. What is left out is the daemon's default.
type specOptions struct {
	image, kernel, vmm     string
	cpus                   int32
	memory, disk, workDisk string
	diskRate, netRate      string
	balloon                bool
	nat, noNAT, isolated   bool
	units                  string
	sshKeys                []string
	cold                   bool
	ports                  []string

	changed func(flag string) bool // whether the user gave the flag
}

func (o *specOptions) addFlags(cmd *cobra.Command, e *Env) {
	f := cmd.Flags()
	f.StringVar(&o.image, "image", "", "image to use, or a reference like docker.io/library/alpine (default: the default image)")
	f.StringVar(&o.kernel, "kernel", "", "kernel to boot (default: the default kernel)")
	f.StringVar(&o.vmm, "vmm", "", "machine monitor: auto, firecracker or qemu (default: auto)")
	f.Int32Var(&o.cpus, "cpus", 0, "number of CPUs")
	f.StringVar(&o.memory, "memory", "", "memory, for instance 512M or 2G")
	f.StringVar(&o.disk, "disk", "", "what / can hold beyond the image, for instance 8G")
	f.StringVar(&o.workDisk, "work-disk", "", "size of the disk mounted at /root, for instance 4G")
	f.StringVar(&o.diskRate, "disk-rate", "", "what each disk may read and write a second, for instance 100M (default: no limit)")
	f.StringVar(&o.netRate, "net-rate", "", "what the network may carry each way a second, for instance 50M (default: no limit; Firecracker only)")
	f.BoolVar(&o.balloon, "balloon", false, "give memory that the VM does not use back to this host; the VM always boots, without a template")
	f.BoolVar(&o.nat, "nat", true, "reach other networks through this host")
	f.Lookup("nat").DefValue = "" // the configuration's
	f.BoolVar(&o.noNAT, "no-nat", false, "the same as --nat=false")
	f.BoolVar(&o.isolated, "isolated", false, "reach no siblings, and be reached by none")
	f.StringVar(&o.units, "units", "", "systemd units of the image that run: fast or stock (default: fast)")
	f.StringArrayVar(&o.sshKeys, "ssh-key", nil, "file of a further public SSH key for root (may be repeated)")
	f.BoolVar(&o.cold, "cold", false, "boot the VM, also when there is a template to restore it from")
	f.StringArrayVarP(&o.ports, "publish", "p", nil, "forward a port of this host into the VM, for instance 8080:80 (may be repeated)")
	for flag, complete := range map[string]completer{
		"image": e.completeImages, "kernel": e.completeKernels,
		"vmm": fixedCompletions(vmms...), "units": fixedCompletions("fast", "stock"),
	} {
		if err := cmd.RegisterFlagCompletionFunc(flag, complete); err != nil {
			panic(err) // the flag exists: it was added above
		}
	}
	o.changed = f.Changed
}

// spec checks what needs no daemon, reads the key files and returns the wish.
func (o *specOptions) spec(name string) (*bangerv1.VMSpec, error) {
	s := &bangerv1.VMSpec{
		Name: name, Image: o.image, Kernel: o.kernel, Vmm: o.vmm, Cpus: o.cpus, Units: o.units, Cold: o.cold,
		Balloon: o.balloon,
	}
	if o.changed("cpus") && o.cpus < 1 {
		return nil, fault.New(fault.Usage, "--cpus %d: a VM has at least one", o.cpus)
	}
	sizes := []struct {
		flag, text string
		to         *int64
	}{
		{"memory", o.memory, &s.MemoryBytes},
		{"disk", o.disk, &s.DiskBytes},
		{"work-disk", o.workDisk, &s.WorkDiskBytes},
		{"disk-rate", strings.TrimSuffix(o.diskRate, "/s"), &s.DiskRate},
		{"net-rate", strings.TrimSuffix(o.netRate, "/s"), &s.NetRate},
	}
	for _, size := range sizes {
		if !o.changed(size.flag) {
			continue
		}
		n, err := parseSizeFlag(size.flag, size.text)
		if err != nil {
			return nil, err
		}
		*size.to = n
	}
	ports, err := portForwards(o.ports)
	if err != nil {
		return nil, fault.New(fault.Usage, "--publish: %v", err).WithHint("%s", fault.HintOf(err))
	}
	s.Ports = ports
	switch {
	case o.noNAT && o.changed("nat") && o.nat:
		return nil, fault.New(fault.Usage, "--nat and --no-nat do not go together")
	case o.noNAT || o.changed("nat"):
		nat := o.nat && !o.noNAT
		s.Nat = &nat
	}
	s.Isolated = o.isolated
	for _, file := range o.sshKeys {
		key, err := readPublicKey(file)
		if err != nil {
			return nil, err
		}
		s.AuthorizedKeys = append(s.AuthorizedKeys, key)
	}
	return s, nil
}

// parseSizeFlag refuses zero as well: on the wire it would mean "the default".
func parseSizeFlag(flag, text string) (int64, error) {
	n, err := vm.ParseSize(text)
	if err != nil {
		return 0, fault.New(fault.Usage, "--%s: %v", flag, err).WithHint("%s", fault.HintOf(err))
	}
	if n == 0 {
		return 0, fault.New(fault.Usage, "--%s %s is too small", flag, text).WithHint("write it like 512M or 4G")
	}
	return n, nil
}

// readPublicKey returns the one key in an authorized_keys style file, such as ~/.ssh/id_ed25519.pub.
func readPublicKey(file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", fault.Wrap(fault.Usage, err, "--ssh-key")
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, 64<<10))
	if err != nil {
		return "", fault.Wrap(fault.Usage, err, "--ssh-key")
	}
	if bytes.Contains(data, []byte("PRIVATE KEY")) {
		return "", fault.New(fault.Usage, "%s is a private key", file).WithHint("give the public one: %s.pub", file)
	}
	if _, _, _, _, err := ssh.ParseAuthorizedKey(data); err != nil {
		return "", fault.New(fault.Usage, "%s holds no public SSH key", file).
			WithHint("give a file like ~/.ssh/id_ed25519.pub")
	}
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if line != "" && !strings.HasPrefix(line, "#") {
			return line, nil
		}
	}
	return "", fault.New(fault.Usage, "%s holds no public SSH key", file)
}
