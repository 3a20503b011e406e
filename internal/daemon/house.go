package daemon

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"banger/api/agent/v1/agentv1connect"
	"banger/internal/builder"
	"banger/internal/capability"
	"banger/internal/engine"
	"banger/internal/fault"
	"banger/internal/forward"
	"banger/internal/hostnet"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/paths"
	"banger/internal/server"
	"banger/internal/store"
	"banger/internal/template"
	"banger/internal/vm"
	"banger/internal/vmm"
	"banger/internal/vmm/fake"
	"banger/internal/vmm/firecracker"
	"banger/internal/vmm/qemu"
)

// house is all the parts of a daemon, put together.
type house struct {
	options Options
	config  settings
	logger  *slog.Logger
	started time.Time

	store   *store.Store
	images  *image.Store
	kernels *kernel.Store
	network hostnet.Network
	drivers []vmm.Driver
	engine  *engine.Engine
	names   *names
	ports   *forward.Forwarder
	builder *builder.Builder

	offBridge sync.Map // vm.ID: VMs of which the log says that the bridge does not reach them

	mu         sync.Mutex   // never held while something is waited for: the daemon's status needs it
	reconciled []string     // guarded by mu
	subnet     netip.Prefix // of the bridge, once known; guarded by mu

	bridge sync.Mutex // held while the bridge is made
}

// assemble puts the parts together. Nothing on the host is changed yet but the database's schema.
func (o Options) assemble(ctx context.Context, config settings, logger *slog.Logger) (_ *house, err error) {
	h := &house{
		options: o, config: config, logger: logger, started: time.Now(), subnet: config.subnet,
		images: image.Open(o.Paths.Images()), kernels: kernel.Open(o.Paths.Kernels(), o.Paths.Cache),
	}
	if h.drivers, err = o.vmms(config, logger); err != nil {
		return nil, err
	}
	agent, err := o.agentBinary()
	if err != nil {
		return nil, err
	}
	if h.store, err = store.Open(ctx, o.Paths.Database()); err != nil {
		return nil, err
	}
	if !config.subnet.IsValid() && !o.FakeVMM {
		if config.subnet, err = subnetOfVMs(ctx, h.store, config.bridge); err != nil {
			return nil, errors.Join(err, h.store.Close())
		}
		h.subnet = config.subnet
	}
	if h.network, err = o.network(ctx, config, logger); err != nil {
		return nil, errors.Join(err, h.store.Close())
	}
	h.names = newNames(h.network, h.subnets, logger)
	h.ports = forward.New(h.dialGuest, logger)
	limits, err := hostLimits(h.drivers)
	if err != nil {
		return nil, errors.Join(err, h.close())
	}
	templates := config.templates
	if config.restore {
		templates.Store = template.Open(o.Paths.Templates())
	}
	h.engine = engine.New(engine.Config{
		Store: h.store, Paths: o.Paths, Drivers: h.drivers, Capabilities: h.capabilities(agent), Logger: logger,
		BootTimeout: config.bootTimeout, StopTimeout: config.stopTimeout, Limits: limits,
		Allocate: h.allocate, MAC: hostnet.MAC, AfterStage: o.AfterStage,
		HostBoot: hostBoot(), Templates: templates,
	})
	h.builder = builder.New(builder.Options{
		Machines: h.verbs(), Images: h.images, Kernel: h.defaultKernel, Paths: o.Paths, Defaults: config.defaults, Mirror: config.mirror,
		Logger: logger, Warm: h.warmImage, Way: builder.HostWay(),
	})
	return h, nil
}

// vmms returns the drivers in order of preference.
func (o Options) vmms(config settings, logger *slog.Logger) ([]vmm.Driver, error) {
	if o.FakeVMM {
		d, err := fake.New(o.FakeCommand...)
		return []vmm.Driver{d}, err
	}
	return []vmm.Driver{
		firecracker.New(firecracker.Options{Binary: config.firecracker.Binary, Jailer: config.firecracker.Jailer, Log: logger}),
		qemu.New(qemu.Options{Log: logger}),
	}, nil
}

// agentBinary returns the program that the guests' init is.
func (o Options) agentBinary() (string, error) {
	path, err := paths.Program("banger-agent")
	if err == nil || !o.FakeVMM {
		return path, err
	}
	// No guest runs it: anything does.
	path = filepath.Join(o.Paths.Cache, "fake-agent")
	if err := os.WriteFile(path, []byte("fake\n"), 0o700); err != nil {
		return "", fault.Wrap(fault.Precondition, err, "cannot write %s", path)
	}
	return path, nil
}

func (h *house) capabilities(agent string) []capability.Capability {
	return capability.All(capability.Options{
		Paths: h.options.Paths, Images: h.images, Kernels: h.kernels, Network: h.network, AgentBinary: agent,
		Nameservers: func() []netip.Addr { return hostnet.Nameservers(os.ReadFile) },
		Names:       h.names, Forwards: h.ports,
	})
}

// network returns the host's network, by way of the privileged helper.
func (o Options) network(ctx context.Context, config settings, logger *slog.Logger) (hostnet.Network, error) {
	if o.FakeVMM {
		return hostnet.NewFake(), nil
	}
	helper, err := paths.Program("banger-nethelper")
	if err != nil {
		return nil, err
	}
	return hostnet.Start(ctx, hostnet.Options{
		HelperPath: helper, HelperLog: o.Paths.HelperLog(), Bridge: config.bridge, Subnet: config.subnet,
		Instance: instance(o.Paths.State), Logger: logger, Pool: config.tapPool, Policy: config.policy,
	})
}

// subnetOfVMs returns the subnet that the VMs have their addresses in when there is no bridge, as after a start
// of the host: a bridge with another one, since a route of that time is gone, would be of no use to them. Zero: choose freely.
func subnetOfVMs(ctx context.Context, s *store.Store, bridge string) (netip.Prefix, error) {
	if _, err := net.InterfaceByName(bridge); err == nil {
		return netip.Prefix{}, nil // it keeps its own
	}
	all, err := s.List(ctx)
	if err != nil {
		return netip.Prefix{}, err
	}
	all = slices.DeleteFunc(all, func(v vm.VM) bool { return !v.IP.IsValid() })
	routes, err := hostnet.ReadRoutes()
	if err != nil || len(all) == 0 {
		return netip.Prefix{}, err
	}
	for _, c := range hostnet.Candidates {
		elsewhere := func(v vm.VM) bool { return !c.Contains(v.IP) }
		if _, clash := hostnet.Clash(c, routes, bridge); !clash && !slices.ContainsFunc(all, elsewhere) {
			return c, nil
		}
	}
	return netip.Prefix{}, nil
}

// hostBoot is the random id of this start of the host (random(4)), or empty.
func hostBoot() string {
	id, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(id))
}

// instance tells two bangers of one user apart, by their state directories.
func instance(state string) string {
	sum := sha256.Sum256([]byte(state))
	return hex.EncodeToString(sum[:4])
}

// hostLimits is what a VM can have at most.
func hostLimits(drivers []vmm.Driver) (vm.Limits, error) {
	var info unix.Sysinfo_t
	if err := unix.Sysinfo(&info); err != nil {
		return vm.Limits{}, fault.Wrap(fault.Unexpected, err, "cannot read the host's memory")
	}
	l := vm.Limits{CPUs: runtime.NumCPU(), MemoryBytes: int64(info.Totalram) * int64(info.Unit)}
	for _, d := range drivers {
		l.VMMs = append(l.VMMs, d.Name())
	}
	return l, nil
}

// allocate picks an address on the bridge's subnet.
func (h *house) allocate(taken map[netip.Addr]bool) (netip.Addr, error) {
	subnet, err := h.bridgeSubnet()
	if err != nil {
		return netip.Addr{}, err
	}
	return hostnet.Allocate(subnet, taken)
}

// bridgeSubnet returns the configured subnet, or the one the bridge has or gets.
func (h *house) bridgeSubnet() (netip.Prefix, error) {
	h.bridge.Lock()
	defer h.bridge.Unlock()
	if subnet := h.knownSubnet(); subnet.IsValid() {
		return subnet, nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	address, err := h.network.EnsureBridge(ctx)
	if err != nil {
		return netip.Prefix{}, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.subnet = address.Masked()
	return h.subnet, nil
}

func (h *house) knownSubnet() netip.Prefix {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.subnet
}

// currentSubnet is the known subnet or, before anything needed one, that of a bridge which an earlier daemon
// made. It makes none.
func (h *house) currentSubnet() netip.Prefix {
	if subnet := h.knownSubnet(); subnet.IsValid() || h.options.FakeVMM {
		return subnet
	}
	bridge, err := net.InterfaceByName(h.config.bridge)
	if err != nil {
		return netip.Prefix{}
	}
	addresses, err := bridge.Addrs()
	if err != nil {
		return netip.Prefix{}
	}
	for _, a := range addresses {
		// Not remembered: what new VMs get is for EnsureBridge to say.
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is4() && hostnet.CheckSubnet(p.Masked()) == nil {
			return p.Masked()
		}
	}
	return netip.Prefix{}
}

// reconcile looks after the VMs of the daemon's predecessor. What it cannot mend concerns single VMs,
// and is told by the daemon's status; the others can be used.
func (h *house) reconcile(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, reconcileTimeout)
	defer cancel()
	begin := time.Now()
	told, err := h.engine.Reconcile(ctx)
	if err != nil {
		h.logger.Error("reconcile", "error", err)
		told = append(told, strings.Split("not mended: "+err.Error(), "\n")...)
	}
	told = append(told, h.builder.Reconcile(ctx)...)
	if err := h.images.Sweep(ctx); err != nil {
		told = append(told, "not removed: "+err.Error())
	}
	told = append(told, h.images.Reconcile()...)
	told = append(told, h.kernels.Reconcile()...)
	h.mu.Lock()
	h.reconciled = told
	h.mu.Unlock()
	h.logger.Info("ready", "duration", time.Since(begin))
	debug.FreeOSMemory() // what the start needed is not needed again
}

// close lets go of everything; VMs run on.
func (h *house) close() error {
	var errs []error
	if h.engine != nil {
		errs = append(errs, h.engine.Close())
	}
	if h.ports != nil {
		h.ports.Close()
	}
	if h.names != nil {
		errs = append(errs, h.names.close())
	}
	errs = append(errs, h.store.Close(), h.closeNetwork())
	return errors.Join(errs...)
}

func (h *house) closeNetwork() error {
	if c, ok := h.network.(*hostnet.Client); ok {
		return c.Close()
	}
	return nil
}

// host tells about the daemon and the machine.
func (h *house) host(ctx context.Context) server.Host {
	info := server.Host{PID: os.Getpid(), StartedAt: h.started, Bridge: h.config.bridge}
	passedOver := "" // why better drivers cannot be used
	for _, d := range h.drivers {
		entry := server.Driver{Name: d.Name()}
		caps, err := d.Caps(ctx)
		if err != nil {
			entry.Reason = err.Error()
		} else {
			entry.Available, entry.Version, entry.Accelerator, entry.Reason = true, caps.Version, caps.Accelerator, or(caps.SlowReason, caps.Warning)
		}
		if entry.Available && info.DefaultVMM == "" {
			info.DefaultVMM = entry.Name
			info.DefaultVMMReason = or(or(caps.SlowReason, passedOver), "the best that works here: "+caps.Accelerator)
		}
		if !entry.Available && passedOver == "" {
			passedOver = "not " + entry.Name + ": " + entry.Reason
		}
		info.Drivers = append(info.Drivers, entry)
	}
	if info.DefaultVMM == "" && len(info.Drivers) > 0 {
		info.DefaultVMMReason = info.Drivers[0].Reason
	}
	if subnet := h.currentSubnet(); subnet.IsValid() {
		info.Subnet = subnet.String()
	}
	info.DNS = h.names.status()
	info.Network = h.networkStatus()
	h.mu.Lock()
	defer h.mu.Unlock()
	info.Reconciled = slices.Clone(h.reconciled)
	return info
}

func or(a, b string) string {
	if a != "" {
		return a
	}
	return b
}

// verbs is the engine as the server sees it.
func (h *house) verbs() server.Engine { return engineVerbs{h.engine} }

type engineVerbs struct{ *engine.Engine }

// Agent returns the engine's client by the interface the server asks for.
func (e engineVerbs) Agent(ctx context.Context, ref string) (agentv1connect.AgentServiceClient, error) {
	agent, err := e.Engine.Agent(ctx, ref)
	if err != nil {
		return nil, err // not agent, which would be a nil pointer in a non-nil interface
	}
	return agent, nil
}
