package fakefc

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// States, as GET / says them.
const (
	notStarted = "Not started"
	running    = "Running"
	paused     = "Paused"
)

// machine is the process and the one microVM of its life.
type machine struct {
	version version
	faults  Faults
	flags   flags
	pci     bool
	log     *logger
	metrics *metrics
	end     chan int // exit codes; the first one counts

	mu         sync.Mutex // one request at a time
	asked      map[int]int
	state      string
	configured bool // no snapshot can be loaded any more
	config     config
	mmds       json.RawMessage
	mmdsLimit  int
	serial     io.Writer
	vsock      *vsock
	taps       map[string]*os.File // by interface
	files      map[string]*os.File // backing files, by drive
	guest      *guest
}

// config is what was configured.
type config struct {
	Balloon  *balloon       `json:"balloon"`
	Drives   []drive        `json:"drives"`
	Boot     bootSource     `json:"boot-source"`
	CPU      any            `json:"cpu-config"`
	Logger   any            `json:"logger"`
	Machine  machineConfig  `json:"machine-config"`
	Metrics  any            `json:"metrics"`
	MMDS     *mmdsConfig    `json:"mmds-config"`
	Networks []netInterface `json:"network-interfaces"`
	Vsock    *vsockConfig   `json:"vsock"`
	Entropy  *entropy       `json:"entropy"`
	Pmem     []pmem         `json:"pmem"`
	Hotplug  *memoryHotplug `json:"memory-hotplug"`
}

func newMachine(f Faults, v version, flags flags, log *logger) *machine {
	return &machine{
		version: v, faults: f, flags: flags, pci: flags.pci, log: log, metrics: &metrics{}, end: make(chan int, 1),
		asked: map[int]int{}, state: notStarted, mmdsLimit: flags.mmdsLimit, serial: os.Stdout,
		taps: map[string]*os.File{}, files: map[string]*os.File{},
		config: config{
			Drives: []drive{}, Networks: []netInterface{}, Pmem: []pmem{},
			Machine: machineConfig{VCPUs: 1, MemoryMiB: 128, HugePages: "None"},
		},
	}
}

// exit ends the process; the first code counts.
func (m *machine) exit(code int) {
	select {
	case m.end <- code:
	default:
	}
}

// handle answers one request of a client.
func (m *machine) handle(c net.Conn, r request) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.log.printf("fc_api", "The API server received a %s request on %q.", r.method, r.path)
	if m.spoil(c, r) {
		return
	}
	a, fatal := m.answer(r)
	m.log.printf("fc_api", "Status code: %d. %s", a.status, a.body)
	_, _ = c.Write(a.bytes()) // who hung up does not want to know
	if fatal {
		m.exit(exitGeneric)
	}
}

// osError words an error of the system as Firecracker does.
func osError(err error) string {
	var number syscall.Errno
	if !errors.As(err, &number) {
		return err.Error()
	}
	text := number.Error()
	return fmt.Sprintf("%s%s (os error %d)", strings.ToUpper(text[:1]), text[1:], int(number))
}

func (m *machine) instanceInfo(*query) (any, error) {
	return struct {
		ID      string `json:"id"`
		State   string `json:"state"`
		Version string `json:"vmm_version"`
		App     string `json:"app_name"`
	}{m.flags.id, m.state, m.faults.version(), "Firecracker"}, nil
}

func (m *machine) putMachine(q *query) (any, error) {
	c := *q.body.(*machineConfig)
	if c.CPUTemplate == nil {
		c.CPUTemplate = m.config.Machine.CPUTemplate
	}
	return nil, m.setMachine(c)
}

func (m *machine) patchMachine(q *query) (any, error) {
	u, c := q.body.(*machineUpdate), m.config.Machine
	set(&c.VCPUs, u.VCPUs)
	set(&c.MemoryMiB, u.MemoryMiB)
	set(&c.SMT, u.SMT)
	set(&c.TrackDirty, u.TrackDirty)
	set(&c.HugePages, u.HugePages)
	if u.CPUTemplate != nil {
		c.CPUTemplate = u.CPUTemplate
	}
	return nil, m.setMachine(c)
}

func set[T any](to, from *T) {
	if from != nil {
		*to = *from
	}
}

func (m *machine) setMachine(c machineConfig) error {
	huge := c.HugePages != "" && c.HugePages != "None"
	switch {
	case c.VCPUs == 0 || c.VCPUs > 32 || c.SMT && c.VCPUs > 1 && c.VCPUs%2 == 1:
		return fail("Machine config error: The number of vCPUs must be greater than 0, at most 32, and 1 or even with SMT.")
	case c.MemoryMiB == 0 || huge && c.MemoryMiB%2 == 1:
		return fail("Machine config error: The memory size (MiB) is either 0, or not a multiple of the configured page size.")
	case m.config.Balloon != nil && uint64(m.config.Balloon.AmountMiB) > c.MemoryMiB:
		return fail("Machine config error: The balloon's target is above the size of the memory.")
	case c.HugePages == "Transparent" && !m.version.atLeast(version{1, 17, 0}):
		return fail("An error occurred when deserializing the json body of a request: unknown variant `Transparent`, expected `None` or `2M`.")
	}
	if c.CPUTemplate != nil && *c.CPUTemplate == "None" {
		c.CPUTemplate = nil
	}
	m.config.Machine = c
	return nil
}

const maxCmdline = 2048

func (m *machine) putBoot(q *query) (any, error) {
	b := *q.body.(*bootSource)
	if err := canOpen(b.Kernel); err != nil {
		return nil, fail("Boot source error: The kernel file cannot be opened: %s", osError(err))
	}
	if b.Initrd != nil {
		if err := canOpen(*b.Initrd); err != nil {
			return nil, fail("Boot source error: The initrd file cannot be opened due to invalid path or permissions. %s", osError(err))
		}
	}
	if b.Args != nil && len(*b.Args) >= maxCmdline {
		return nil, fail("Boot source error: The kernel command line is invalid: capacity of the command line was exceeded.")
	}
	m.config.Boot = b
	return nil, nil
}

func canOpen(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	return f.Close()
}

func (m *machine) actions(q *query) (any, error) {
	switch q.body.(*action).Type {
	case "InstanceStart":
		if err := m.start(); err != nil {
			return nil, fail("Start microvm error: %s", err)
		}
	case "FlushMetrics":
		m.metrics.flush()
	case "SendCtrlAltDel":
		m.guest.ctrlAltDel()
	}
	return nil, nil
}

// start boots the guest. When it fails the machine can be configured on.
func (m *machine) start() error {
	switch {
	case m.config.Boot.Kernel == "":
		return fail("Cannot start microvm without kernel configuration.")
	case m.faults.KVM != 0:
		return errKVM(m.faults.KVM)
	}
	if err := checkMemory(m.config.Machine.MemoryMiB); err != nil {
		return err
	}
	if len(m.cmdline()) >= maxCmdline {
		return fail("Cannot load command line string: capacity of the command line was exceeded.")
	}
	if err := m.checkKernel(m.config.Boot.Kernel); err != nil {
		return fail("System configuration error: Cannot load kernel due to invalid memory configuration or invalid kernel image: %s", err)
	}
	if path := m.config.Boot.Initrd; path != nil {
		info, err := os.Stat(*path)
		if err != nil {
			return fail("Cannot load initrd: %s", osError(err))
		}
		if uint64(info.Size()) >= m.config.Machine.MemoryMiB<<20 {
			return fail("Cannot load initrd due to an invalid memory configuration.")
		}
	}
	g, err := newGuest(m, strings.Fields(m.cmdline()))
	if err != nil {
		return err
	}
	m.state, m.guest = running, g
	g.boot()
	return nil
}

// errKVM has a line break in it, as the real one has.
func errKVM(err error) error {
	return fail("Kvm error: Error creating KVM object: %s Make sure the user launching the firecracker process is \\\nconfigured on the /dev/kvm file's ACL.", osError(err))
}

// checkMemory maps as much as the guest would get, for a moment.
func checkMemory(mib uint64) error {
	size := mib << 20
	if size>>20 != mib || int(size) < 0 {
		return fail("Cannot create mmap region: %s", osError(syscall.ENOMEM))
	}
	b, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return fail("Cannot create mmap region: %s", osError(err))
	}
	return unix.Munmap(b)
}

// cmdline is what the guest's kernel is told: the default is replaced by boot_args, and some is added.
func (m *machine) cmdline() string {
	args := defaultArgs(m.version)
	if m.config.Boot.Args != nil {
		args = *m.config.Boot.Args
	}
	if !m.pci && m.version.atLeast(version{1, 13, 0}) {
		args += " pci=off"
	}
	for _, d := range m.config.Drives {
		if !d.Root {
			continue
		}
		root := "/dev/vda"
		if d.PartUUID != nil {
			root = "PARTUUID=" + *d.PartUUID
		}
		args += " root=" + root + map[bool]string{true: " ro", false: " rw"}[d.readOnly()]
	}
	if m.pci {
		return args
	}
	devices := len(m.config.Drives) + len(m.config.Networks) + len(m.config.Pmem)
	for _, there := range []bool{m.config.Vsock != nil, m.config.Entropy != nil, m.config.Balloon != nil, m.config.Hotplug != nil} {
		if there {
			devices++
		}
	}
	for i := range devices {
		args += fmt.Sprintf(" virtio_mmio.device=4K@%#x:%d", 0xc0001000+i*0x1000, 5+i)
	}
	return args
}

func defaultArgs(v version) string {
	switch {
	case v.atLeast(version{1, 13, 0}):
		return "reboot=k panic=1 nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd swiotlb=noforce"
	case v.atLeast(version{1, 12, 0}):
		return "reboot=k panic=1 pci=off nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.dumbkbd"
	}
	return "reboot=k panic=1 pci=off nomodule 8250.nr_uarts=0 i8042.noaux i8042.nomux i8042.nopnp i8042.dumbkbd"
}

// checkKernel looks at the file's format alone.
func (m *machine) checkKernel(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return failure(osError(err))
	}
	defer f.Close()
	head := make([]byte, 0x206)
	n, err := io.ReadFull(f, head)
	if err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
		return fail("Kernel Loader: failed to load ELF kernel image: Unable to read ELF header")
	}
	head = head[:n]
	switch {
	case slices.Equal(head[:min(n, 4)], []byte("\x7fELF")):
		if n < 0x14 || head[4] != 2 || head[5] != 1 {
			return fail("Kernel Loader: failed to load ELF kernel image: invalid ELF class or byte order")
		}
		if machine := int(head[0x12]) | int(head[0x13])<<8; machine != 62 {
			return fail("Kernel Loader: failed to load ELF kernel image: of another machine (%d)", machine)
		}
		return nil
	case n == 0x206 && string(head[0x202:0x206]) == "HdrS" && m.version.atLeast(version{1, 17, 0}):
		return nil
	}
	if m.version.atLeast(version{1, 17, 0}) {
		return fail("Kernel Loader: failed to load bzImage kernel image: Kernel Loader: Invalid bzImage")
	}
	return fail("Kernel Loader: failed to load ELF kernel image: Invalid Elf magic number")
}

func (m *machine) patchVM(q *query) (any, error) {
	if q.body.(*stateChange).State == "Paused" {
		m.guest.clock.Set(true)
		m.state = paused
		return nil, nil
	}
	m.resume()
	return nil, nil
}

// resume lets the guest go on. One that was saved finds its streams reset.
func (m *machine) resume() {
	m.state = running
	if m.guest.saved {
		m.guest.saved = false
		m.vsock.reset()
	}
	m.guest.resume()
}

// orphanCheck is how often the process looks whether its working directory is still there: no test leaves one behind.
const orphanCheck = 10 * time.Second
