package kernel

import (
	"bufio"
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"

	"banger/internal/fault"
)

// Option is an option of a kernel's configuration that somebody counts on.
type Option struct {
	Name     string // without CONFIG_
	Value    string // y, m, n or a value; empty: not known
	OK       bool
	Required bool // banger cannot do without it
	Purpose  string
}

// needs are the options and what they are for. Docker's are those of its own check-config.sh (moby/contrib).
var needs = []struct {
	purpose  string
	required bool
	names    string
	only     string // on this architecture
}{
	{"start from an initramfs", true, "BLK_DEV_INITRD DEVTMPFS TMPFS PROC_FS SYSFS", ""},
	{"disks", true, "VIRTIO VIRTIO_BLK EXT4_FS OVERLAY_FS", ""},
	{"devices of QEMU", true, "VIRTIO_PCI", ""},
	{"guest channel", true, "VIRTIO_CONSOLE", ""},
	{"network", true, "NET INET UNIX VIRTIO_NET PACKET", ""},
	{"programs and terminals", true, "BINFMT_ELF UNIX98_PTYS SHMEM", ""},
	{"start by the machine monitor", true, "PVH", "amd64"},
	{"console", false, "SERIAL_8250_CONSOLE", "amd64"},
	{"devices of Firecracker", false, "VIRTIO_MMIO VIRTIO_VSOCKETS", ""},
	{"random numbers", false, "HW_RANDOM_VIRTIO", ""},
	{"systemd", false, "CGROUPS INOTIFY_USER SIGNALFD TIMERFD EPOLL FHANDLE AUTOFS_FS SECCOMP_FILTER", ""},
	{"knowing of a copy (fork, restore)", false, "VMGENID", ""},
	{"Docker: namespaces", false, "NAMESPACES NET_NS PID_NS IPC_NS UTS_NS USER_NS", ""},
	{"Docker: control groups", false, "MEMCG CPUSETS CGROUP_PIDS CGROUP_FREEZER CGROUP_DEVICE CGROUP_BPF BLK_CGROUP CFS_BANDWIDTH FAIR_GROUP_SCHED", ""},
	{"Docker: network", false, "VETH BRIDGE BRIDGE_NETFILTER NETFILTER NF_NAT NF_CONNTRACK NETFILTER_XT_MATCH_ADDRTYPE NETFILTER_XT_MATCH_CONNTRACK NETFILTER_XT_MARK IP_NF_FILTER IP_NF_NAT IP_NF_TARGET_MASQUERADE NF_TABLES", ""},
	{"Docker: the rest", false, "KEYS POSIX_MQUEUE SECCOMP", ""},
}

// CheckConfig compares a kernel's configuration with what banger and Docker need. A kernel whose configuration is
// not known is a Precondition fault.
func (s *Store) CheckConfig(ctx context.Context, name string) (Kernel, []Option, error) {
	k, err := s.Get(ctx, name)
	if err != nil {
		return k, nil, err
	}
	text, err := os.ReadFile(filepath.Join(k.Dir, configName))
	if err != nil {
		return k, nil, fault.New(fault.Precondition, "the configuration of kernel %s is not known", k.Name).
			WithHint("import it again with its configuration: banger kernel import FILE --config FILE")
	}
	return k, compare(parseConfig(text), k.Architecture, k.ModulesDisk != ""), nil
}

// compare tells of each option how it is; modules are good enough where there are some.
func compare(config map[string]string, architecture string, modules bool) []Option {
	var options []Option
	for _, n := range needs {
		if n.only != "" && n.only != architecture {
			continue
		}
		for name := range strings.FieldsSeq(n.names) {
			o := Option{Name: name, Value: config[name], Required: n.required, Purpose: n.purpose}
			if o.Value == "" {
				o.Value = "n" // "is not set", or an option that this kernel does not have
			}
			o.OK = o.Value == "y" || o.Value == "m" && modules
			options = append(options, o)
		}
	}
	return options
}

// parseConfig reads a kernel's configuration: CONFIG_X=y, "# CONFIG_Y is not set".
func parseConfig(text []byte) map[string]string {
	config := map[string]string{}
	lines := bufio.NewScanner(bytes.NewReader(text))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		name, value, ok := strings.Cut(lines.Text(), "=")
		if name, is := strings.CutPrefix(name, "CONFIG_"); is && ok {
			config[name] = strings.Trim(value, `"`)
		}
	}
	return config
}

// builtInOption names the option of each module an initramfs may need.
var builtInOption = map[string]string{
	"virtio_pci": "VIRTIO_PCI", "virtio_mmio": "VIRTIO_MMIO", "virtio_blk": "VIRTIO_BLK", "virtio_net": "VIRTIO_NET",
	"virtio_console": "VIRTIO_CONSOLE", "virtio_rng": "HW_RANDOM_VIRTIO", "ext4": "EXT4_FS", "overlay": "OVERLAY_FS",
	"vmw_vsock_virtio_transport": "VIRTIO_VSOCKETS",
}
