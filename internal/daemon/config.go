package daemon

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"banger/internal/engine"
	"banger/internal/fault"
	"banger/internal/hostnet"
	"banger/internal/paths"
	"banger/internal/server"
	"banger/internal/tomlfile"
	"banger/internal/vm"
	"banger/internal/vmm/fake"
	"banger/internal/vmm/firecracker"
	"banger/internal/vmm/qemu"
)

// Config is the user's configuration, config.toml. Everything has a default; unknown keys are errors.
type Config struct {
	// What a new VM is when its creator does not say.
	VMM      string `toml:"vmm"`       // auto, firecracker or qemu
	CPUs     int    `toml:"cpus"`      // 2, or 1 on a host with one
	Memory   string `toml:"memory"`    // "1G"
	Disk     string `toml:"disk"`      // what / can hold beyond the image: "4G"
	WorkDisk string `toml:"work_disk"` // the disk at /root: "4G"
	Image    string `toml:"image"`     // empty: the default image
	Kernel   string `toml:"kernel"`    // empty: the default kernel

	Mirror string `toml:"mirror"` // of Debian, for setup; empty: "http://deb.debian.org/debian"

	BootTimeout string `toml:"boot_timeout"` // until the agent answers: "3m"
	StopTimeout string `toml:"stop_timeout"` // for the guest's own shutdown: "30s"
	LogLevel    string `toml:"log_level"`    // debug, info, warn or error

	Templates       bool   `toml:"templates"`         // whether new VMs are restored from templates: true
	TemplateBudget  string `toml:"template_budget"`   // what all templates together may take on disk: "4G"
	TemplateAgeDays int    `toml:"template_age_days"` // after so many days without a use one is removed: 30

	Network     NetworkConfig     `toml:"network"`
	Firecracker FirecrackerConfig `toml:"firecracker"`
	DNS         DNSConfig         `toml:"dns"`
}

// FirecrackerConfig is the section [firecracker].
type FirecrackerConfig struct {
	Binary string `toml:"binary"` // absolute path; empty: the one in PATH
	Jailer bool   `toml:"jailer"` // whether upstream's jailer starts it, as root: false
}

// DNSConfig is the section [dns].
type DNSConfig struct {
	// Where the host asks for names of VMs: "127.0.0.1:42069". Port 0 is one that is free; empty: nowhere.
	Listen string `toml:"listen"`
}

// NetworkConfig is the section [network].
type NetworkConfig struct {
	Bridge string `toml:"bridge"` // banger0
	Subnet string `toml:"subnet"` // "172.30.0.0/16"; empty: the first of a list that clashes with no route
	NAT    bool   `toml:"nat"`    // whether VMs reach the world when their creator does not say: true

	TAPPool int `toml:"tap_pool"` // how many TAP devices wait for VMs: 4

	// Whether VMs reach what listens on the host beside banger's DNS: false.
	HostServices bool `toml:"host_services"`
	// Whether VMs with NAT reach 169.254.0.0/16, where clouds hand out a machine's credentials: false.
	LinkLocal bool `toml:"link_local"`
}

// DefaultConfig is what holds without a config.toml.
func DefaultConfig() Config {
	return Config{
		VMM: "auto", CPUs: min(2, runtime.NumCPU()), Memory: "1G", Disk: "4G", WorkDisk: "4G",
		BootTimeout: "3m", StopTimeout: "30s", LogLevel: "info",
		Templates: true, TemplateBudget: "4G", TemplateAgeDays: 30,
		DNS:     DNSConfig{Listen: paths.DNSAddress},
		Network: NetworkConfig{Bridge: paths.Bridge, NAT: true, TAPPool: 4},
	}
}

// maxTAPPool is the most TAP devices that wait: nobody starts more VMs at once.
const maxTAPPool = 64

// settings is the configuration with its values read.
type settings struct {
	defaults    vm.Spec
	named       server.Named // where it names the image and the kernel of the defaults
	mirror      string       // empty: Debian's own
	bootTimeout time.Duration
	stopTimeout time.Duration
	logLevel    slog.Level
	restore     bool                  // whether there are templates
	templates   engine.TemplateConfig // without its store
	firecracker FirecrackerConfig
	bridge      string
	tapPool     int
	policy      hostnet.Policy
	subnet      netip.Prefix   // zero: choose one
	dns         netip.AddrPort // zero: no listener
}

// loadConfig reads the file at path; none means the defaults. Its faults name the file, the line or key, and what would do.
func loadConfig(path string) (settings, error) {
	config := DefaultConfig()
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return settings{}, fault.Wrap(fault.Precondition, err, "cannot read %s", path)
	}
	if err := tomlfile.Decode(path, data, &config); err != nil {
		return settings{}, err
	}
	s, err := config.settings()
	if err != nil {
		return s, fault.Wrap(fault.Usage, err, "%s", path).WithHint("%s", hintOr(err, "correct the file"))
	}
	s.named = server.Named{Image: whereNamed(path, data, "image", config.Image), Kernel: whereNamed(path, data, "kernel", config.Kernel)}
	return s, nil
}

// whereNamed says where the file at path, which holds data, gives a key its value; "" when that is empty.
func whereNamed(path string, data []byte, key, value string) string {
	if value == "" {
		return ""
	}
	return fmt.Sprintf("%s:%d", path, tomlfile.Line(data, key))
}

func hintOr(err error, otherwise string) string {
	if hint := fault.HintOf(err); hint != "" {
		return hint
	}
	return otherwise
}

// settings reads the values. What depends on the host's size is checked at create, not here.
func (c Config) settings() (settings, error) {
	var r reader
	s := settings{
		defaults: vm.Spec{
			VMM: c.VMM, CPUs: c.CPUs, Image: c.Image, Kernel: c.Kernel, NAT: c.Network.NAT, Units: vm.UnitsFast,
			MemoryBytes: r.size("memory", c.Memory), DiskBytes: r.size("disk", c.Disk),
			WorkDiskBytes: r.size("work_disk", c.WorkDisk),
		},
		bootTimeout: r.duration("boot_timeout", c.BootTimeout),
		stopTimeout: r.duration("stop_timeout", c.StopTimeout),
		bridge:      c.Network.Bridge,
		firecracker: c.Firecracker,
		restore:     c.Templates,
		mirror:      c.Mirror,
	}
	s.templates = engine.TemplateConfig{
		DiskBytes: s.defaults.DiskBytes, WorkDiskBytes: s.defaults.WorkDiskBytes,
		Budget: r.size("template_budget", c.TemplateBudget), MaxAge: time.Duration(c.TemplateAgeDays) * 24 * time.Hour,
	}
	if c.TemplateAgeDays < 1 {
		r.note("template_age_days", fault.New(fault.Usage, "%d is no number of days", c.TemplateAgeDays).WithHint("use at least 1"))
	}
	r.note("vmm", checkVMM(c.VMM))
	if c.Firecracker.Binary != "" && !filepath.IsAbs(c.Firecracker.Binary) {
		r.note("firecracker.binary", fault.New(fault.Usage, "%q is no absolute path", c.Firecracker.Binary).WithHint("for example /usr/local/bin/firecracker"))
	}
	r.note("mirror", checkMirror(c.Mirror))
	s.dns = r.loopback("dns.listen", c.DNS.Listen)
	s.tapPool, s.policy = c.Network.TAPPool, hostnet.Policy{HostServices: c.Network.HostServices, LinkLocal: c.Network.LinkLocal}
	if s.tapPool < 0 || s.tapPool > maxTAPPool {
		r.note("network.tap_pool", fault.New(fault.Usage, "%d is no number of TAP devices", s.tapPool).WithHint("use 0 to %d", maxTAPPool))
	}
	r.note("network.bridge", hostnet.CheckBridge(c.Network.Bridge))
	if err := s.logLevel.UnmarshalText([]byte(c.LogLevel)); err != nil {
		r.note("log_level", fault.New(fault.Usage, "%q is no level", c.LogLevel).WithHint("use debug, info, warn or error"))
	}
	if c.Network.Subnet != "" {
		var err error
		if s.subnet, err = netip.ParsePrefix(c.Network.Subnet); err != nil {
			r.note("network.subnet", fault.New(fault.Usage, "%q is no subnet", c.Network.Subnet).WithHint("for example %s", paths.Subnet))
		} else {
			r.note("network.subnet", hostnet.CheckSubnet(s.subnet))
		}
	}
	return s, r.err
}

// checkVMM refuses what no driver is called.
func checkVMM(name string) error {
	if name == "auto" || name == firecracker.Name || name == qemu.Name || name == fake.Name {
		return nil
	}
	return fault.New(fault.Usage, "%q is no VMM", name).WithHint("use auto, firecracker or qemu")
}

// checkMirror refuses what is no address that packages can be fetched from.
func checkMirror(text string) error {
	u, err := url.Parse(text)
	fetched := err == nil && (u.Scheme == "http" || u.Scheme == "https") && u.Host != "" || err == nil && u.Scheme == "file" && u.Path != ""
	if text == "" || fetched && !strings.ContainsAny(text, " \t\r\n[]\"") {
		return nil
	}
	return fault.New(fault.Usage, "%q is no address of a Debian mirror", text).WithHint("for example http://deb.debian.org/debian")
}

// reader keeps the first thing that was wrong.
type reader struct{ err error }

func (r *reader) note(key string, err error) {
	if err != nil && r.err == nil {
		r.err = fmt.Errorf("%s: %w", key, err)
	}
}

func (r *reader) size(key, text string) int64 {
	n, err := vm.ParseSize(text)
	r.note(key, err)
	return n
}

// loopback reads an address and port of the host itself: nobody else is to learn which VMs there are.
func (r *reader) loopback(key, text string) netip.AddrPort {
	if text == "" {
		return netip.AddrPort{}
	}
	a, err := netip.ParseAddrPort(text)
	if err != nil || !a.Addr().IsLoopback() || a.Addr().Zone() != "" {
		r.note(key, fault.New(fault.Usage, "%q is no loopback address with a port", text).WithHint("for example %q", paths.DNSAddress))
		return netip.AddrPort{}
	}
	return a
}

// duration reads a time limit: a second to an hour.
func (r *reader) duration(key, text string) time.Duration {
	d, err := time.ParseDuration(text)
	if err != nil || d < time.Second || d > time.Hour {
		r.note(key, fault.New(fault.Usage, "%q is no time limit", text).WithHint("use one from 1s to 1h, for example 90s"))
	}
	return d
}
