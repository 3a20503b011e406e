// Package boot is the first process of a guest: /init of the initramfs. It loads modules, mounts the VM's
// disks, makes the image what the guest config says, starts the agent, and executes the image's own init.
//
// Nothing of ours is in the image. What the init writes into it (names, keys, the hosts file) it writes
// again at every start; what it adds for systemd lies under /run.
package boot

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/encoding/protojson"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/identity"
)

// Where the agent lives in a running guest.
const (
	Dir       = "/run/banger"
	AgentPath = Dir + "/agent"
	PIDFile   = Dir + "/agent.pid"

	// OverlayDir is where the overlay disk's own ext4 is mounted, when there is one.
	OverlayDir = keepDir + "/overlay"
)

// keepDir holds what lives as long as the machine: systemd leaves mounts below /run/initramfs alone
// when it shuts down.
const (
	keepDir   = "/run/initramfs"
	agentFile = keepDir + "/agent" // the program, a link to which is AgentPath
)

// configFile holds the guest config in the initramfs.
const configFile = "/banger/config.json"

// clockSlack is how far the clock may be behind the config's before it is stepped: the
// config is older than the boot.
const clockSlack = 100 * time.Millisecond

// Run is the init. It returns only by not returning: the image's init takes over, or the kernel panics
// after one line on the console that says why.
func Run() {
	debug.SetGCPercent(-1) // a few megabytes in all, for a few hundred milliseconds
	defer func() {
		if r := recover(); r != nil {
			fail(fmt.Errorf("panic: %v\n%s", r, debug.Stack()))
		}
	}()
	fail(run())
}

// fail ends the machine so that the VMM sees it: the end of the first process is a kernel panic, and
// a panic ends the VMM's process.
func fail(err error) {
	fmt.Fprintf(os.Stderr, "banger: init: %v\n", err)
	_ = os.WriteFile("/proc/sys/kernel/panic", []byte("-1"), 0) // without it the kernel command line decides
	unix.Sync()
	os.Exit(1)
}

// warn says on the console what a guest can live without: one that runs can be repaired from inside.
func warn(err error) {
	fmt.Fprintf(os.Stderr, "banger: init: warning: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
}

// run does the work. It returns only on an error.
func run() error {
	if err := mountKernel(); err != nil {
		return err
	}
	if err := openConsole(); err != nil {
		return err
	}
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return err
	}
	cfg, err := readConfig(configFile)
	if err != nil {
		return err
	}
	if err := loadModules("/lib/modules", cfg.GetModules()); err != nil {
		return err
	}
	setClock(cfg.GetUnixNanos())
	plan, err := planDisks(cfg.GetDisks())
	if err != nil {
		return err
	}
	if err := mountRoot(plan); err != nil {
		return err
	}
	if err := installAgent(); err != nil {
		return err
	}
	forget(configFile, "/lib/modules")
	if err := switchRoot(); err != nil {
		return err
	}
	initPath := findInit("/", initArgument(string(line)))
	// The agent gets ready while we go on, and answers when we are done.
	var agent starting
	if initPath != "" {
		if agent, err = startAgent(channelOf(cfg)); err != nil {
			return err
		}
	}
	if err := settle(plan, cfg); err != nil {
		return err
	}
	return handOver(agent, cfg, initPath)
}

// settle makes the mounted root what the config says.
func settle(plan diskPlan, cfg *agentv1.GuestConfig) error {
	var release unix.Utsname
	if err := unix.Uname(&release); err != nil {
		return err
	}
	modules := "/lib/modules/" + unix.ByteSliceToString(release.Release[:])
	if err := mountRest(plan, cfg.GetPlainDirs(), modules); err != nil {
		return err
	}
	if err := makeNodes(modules); err != nil {
		return err
	}
	if err := unix.Sethostname([]byte(cfg.GetHostname())); err != nil {
		return fmt.Errorf("set the host name: %w", err)
	}
	if err := identity.Write("/", cfg); err != nil {
		warn(err)
	}
	return identity.ConfigureNetwork(cfg.GetInterfaces())
}

// handOver lets the agent answer and becomes the image's init.
func handOver(agent starting, cfg *agentv1.GuestConfig, initPath string) error {
	if initPath == "" {
		err := syscall.Exec(AgentPath, []string{AgentPath, "supervise", channelOf(cfg)}, environment())
		return fmt.Errorf("execute the agent as supervisor: %w", err)
	}
	if err := writeUnits("/", cfg); err != nil {
		return err
	}
	if err := agent.release(); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "banger: %s is set up; its agent answers, %s starts\n", cfg.GetHostname(), initPath)
	err := syscall.Exec(initPath, []string{initPath}, environment())
	return fmt.Errorf("execute %s: %w", initPath, err)
}

// environment is that of the image's init; it sets its own.
func environment() []string {
	return []string{"HOME=/", "TERM=linux", "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"}
}

func readConfig(name string) (*agentv1.GuestConfig, error) {
	b, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("read the guest config: %w", err)
	}
	cfg := &agentv1.GuestConfig{}
	// A newer host's config may have fields that this agent does not know.
	if err := (protojson.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(b, cfg); err != nil {
		return nil, fmt.Errorf("read the guest config: %w", err)
	}
	if channelOf(cfg) == "" {
		return nil, fmt.Errorf("read the guest config: it names no port for the guest channel")
	}
	return cfg, nil
}

// VsockPrefix begins the name of a guest channel over vsock; the port's number follows.
const VsockPrefix = "vsock:"

// channelOf names where the agent listens: a virtio-serial port, or a vsock port where the machine has none; "" when
// the config says neither.
func channelOf(cfg *agentv1.GuestConfig) string {
	if name := cfg.GetChannelPort(); name != "" || cfg.GetChannelVsockPort() == 0 {
		return name
	}
	return VsockPrefix + strconv.FormatUint(uint64(cfg.GetChannelVsockPort()), 10)
}

// setClock steps the clock forward to the config's time when it is behind that.
func setClock(unixNanos int64) {
	if unixNanos == 0 || time.Until(time.Unix(0, unixNanos)) < clockSlack {
		return
	}
	ts := unix.NsecToTimespec(unixNanos)
	// The host sets the clock again once the agent answers.
	_ = unix.ClockSettime(unix.CLOCK_REALTIME, &ts)
}

// initArgument is the init= of the kernel's command line, or "".
func initArgument(line string) string {
	path := ""
	for _, word := range strings.Fields(line) {
		if word == "--" {
			break
		}
		if v, ok := strings.CutPrefix(word, "init="); ok {
			path = v
		}
	}
	return path
}

// Init is what the guest's first process is, or is about to become; "" in a guest without an init that works.
func Init() string {
	line, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return ""
	}
	return findInit("/", initArgument(string(line)))
}

// findInit returns the image's init below root, or "" when it has none that works.
func findInit(root, wanted string) string {
	for _, path := range []string{wanted, "/sbin/init", "/lib/systemd/systemd", "/usr/lib/systemd/systemd", "/etc/init"} {
		if path == "" {
			continue
		}
		info, err := os.Stat(filepath.Join(root, path))
		if err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 && !idleBusyBox(root, path) {
			return path
		}
	}
	return ""
}

// idleBusyBox tells whether an init is BusyBox with nothing to start, as in Alpine's container images: what its
// inittab names for the system's start is not installed.
func idleBusyBox(root, path string) bool {
	target, err := filepath.EvalSymlinks(filepath.Join(root, path))
	if err != nil || filepath.Base(target) != "busybox" {
		return false
	}
	program := "/etc/init.d/rcS" // without an inittab; busybox/init/init.c
	table, _ := os.ReadFile(filepath.Join(root, "etc/inittab"))
	for line := range strings.Lines(string(table)) {
		if f := strings.SplitN(strings.TrimSpace(line), ":", 4); len(f) == 4 && !strings.HasPrefix(line, "#") && f[2] == "sysinit" {
			program, _, _ = strings.Cut(f[3], " ")
			break
		}
	}
	_, err = os.Stat(filepath.Join(root, program))
	return err != nil
}

// forget removes what the initramfs need not keep in memory, or must not: the config holds a private key.
func forget(names ...string) {
	for _, name := range names {
		_ = os.RemoveAll(name) // the memory is all that is lost
	}
}
