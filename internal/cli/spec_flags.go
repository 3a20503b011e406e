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

// specOptions are the flags that say what a new VM is like. What is left out is the daemon's default.
type specOptions struct {
	image, kernel, vmm     string
	cpus                   int32
	memory, disk, workDisk string
	noNAT                  bool
	units                  string
	sshKeys                []string
	cold                   bool

	changed func(flag string) bool // whether the user gave the flag
}

func (o *specOptions) addFlags(cmd *cobra.Command, e *Env) {
	f := cmd.Flags()
	f.StringVar(&o.image, "image", "", "image to use, or a reference like docker.io/library/alpine (default: the default image)")
	f.StringVar(&o.kernel, "kernel", "", "kernel to boot (default: the default kernel)")
	f.StringVar(&o.vmm, "vmm", "", "machine monitor: auto or qemu (default auto)")
	f.Int32Var(&o.cpus, "cpus", 0, "number of CPUs")
	f.StringVar(&o.memory, "memory", "", "memory, for instance 512M or 2G")
	f.StringVar(&o.disk, "disk", "", "what / can hold beyond the image, for instance 8G")
	f.StringVar(&o.workDisk, "work-disk", "", "size of the disk mounted at /root, for instance 4G")
	f.BoolVar(&o.noNAT, "no-nat", false, "no way out of the host for this VM")
	f.StringVar(&o.units, "units", "", "systemd units of the image that run: fast or stock (default fast)")
	f.StringArrayVar(&o.sshKeys, "ssh-key", nil, "file of a further public SSH key for root (may be repeated)")
	f.BoolVar(&o.cold, "cold", false, "boot the VM, also when there is a template to restore it from")
	for flag, complete := range map[string]completer{
		"image": e.completeImages, "kernel": e.completeKernels,
		"vmm": fixedCompletions("auto", "qemu"), "units": fixedCompletions("fast", "stock"),
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
	}
	if o.changed("cpus") && o.cpus < 1 {
		return nil, fault.New(fault.Usage, "--cpus %d: a VM has at least one", o.cpus)
	}
	sizes := []struct {
		flag, text string
		to         *int64
	}{
		{"memory", o.memory, &s.MemoryBytes}, {"disk", o.disk, &s.DiskBytes}, {"work-disk", o.workDisk, &s.WorkDiskBytes},
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
	if o.noNAT {
		nat := false
		s.Nat = &nat
	}
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
