package fakefc

import (
	"encoding/json"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
)

// fail is an error in the API's style of text.
func fail(format string, args ...any) error { return failure(fmt.Sprintf(format, args...)) }

type failure string

func (f failure) Error() string { return string(f) }

func (m *machine) getVersion(*query) (any, error) {
	return map[string]string{"firecracker_version": m.faults.version()}, nil
}

// getConfig shows no serial output, and neither logger, metrics nor CPU configuration.
func (m *machine) getConfig(*query) (any, error) { return m.config, nil }

func (m *machine) putLogger(q *query) (any, error) {
	return nil, m.log.set(m.version, *q.body.(*loggerConfig))
}

func (m *machine) putMetrics(q *query) (any, error) {
	return nil, m.metrics.set(m.version, q.body.(*metricsConfig).Path)
}

func (m *machine) putSerial(q *query) (any, error) {
	s := q.body.(*serialConfig)
	if s.Path == nil {
		return nil, nil
	}
	f, err := openSink(m.version, *s.Path)
	if err != nil {
		return nil, fail("Serial error: Failed to open the output file: %s", osError(err))
	}
	m.serial = f
	return nil, nil
}

func (m *machine) putDrive(q *query) (any, error) {
	d := *q.body.(*drive)
	if m.state != notStarted && (d.Root || slices.ContainsFunc(m.config.Drives, func(o drive) bool { return o.ID == d.ID })) {
		return nil, fail("Device hotplug error: Device ID in use.")
	}
	other := func(o drive) bool { return o.Root && o.ID != d.ID }
	if d.Root && slices.ContainsFunc(m.config.Drives, other) {
		return nil, fail("Drive config error: A root block device already exists!")
	}
	if (d.Path == nil) == (d.Socket == nil) {
		return nil, fail("Drive config error: Unable to create the virtio block device: Invalid block config.")
	}
	if d.Path != nil {
		f, err := openBacking(*d.Path, d.readOnly())
		if err != nil {
			return nil, fail("Drive config error: Unable to create the virtio block device: Virtio backend error: %s", err)
		}
		m.keep(m.files, d.ID, f)
	}
	if d.Engine == nil {
		engine := ioEngine("Sync")
		d.Engine = &engine
	}
	m.config.Drives = replace(m.config.Drives, d, func(o drive) bool { return o.ID == d.ID })
	// The root drive is always the first.
	slices.SortStableFunc(m.config.Drives, func(a, b drive) int { return b2i(b.Root) - b2i(a.Root) })
	return nil, nil
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

// keep remembers an open file under a name, and closes the one before.
func (m *machine) keep(files map[string]*os.File, id string, f *os.File) {
	if old := files[id]; old != nil {
		_ = old.Close()
	}
	files[id] = f
}

// replace puts v where one like it is, or at the end.
func replace[T any](list []T, v T, like func(T) bool) []T {
	if i := slices.IndexFunc(list, like); i >= 0 {
		list[i] = v
		return list
	}
	return append(list, v)
}

func openBacking(path string, readOnly bool) (*os.File, error) {
	mode := os.O_RDWR
	if readOnly {
		mode = os.O_RDONLY
	}
	f, err := os.OpenFile(path, mode, 0)
	if err != nil {
		return nil, fail("Error manipulating the backing file: %s %s", osError(err), path)
	}
	info, err := f.Stat()
	if err == nil && info.IsDir() {
		err = unix.EISDIR
	}
	if err != nil {
		_ = f.Close()
		return nil, fail("Error manipulating the backing file: %s %s", osError(err), path)
	}
	return f, nil
}

func (m *machine) patchDrive(q *query) (any, error) {
	u := q.body.(*driveUpdate)
	i := slices.IndexFunc(m.config.Drives, func(d drive) bool { return d.ID == u.ID })
	if i < 0 {
		return nil, fail("Drive config error: Unable to patch the block device: no device found with id %s.", u.ID)
	}
	d := &m.config.Drives[i]
	if u.Path == nil && u.Limiter == nil {
		return nil, fail("Drive config error: Unable to patch the block device: Invalid block config update.")
	}
	if u.Path != nil {
		f, err := openBacking(*u.Path, d.readOnly())
		if err != nil {
			return nil, fail("Drive config error: Unable to patch the block device: %s", err)
		}
		m.keep(m.files, d.ID, f)
		d.Path = u.Path
	}
	if u.Limiter != nil {
		d.Limiter = merged(d.Limiter, u.Limiter)
	}
	return nil, nil
}

// merged leaves buckets that are not named as they were. One of nothing takes a bucket away, and no limiter is left
// without any: seen of 1.16.1.
func merged(old, update *rateLimiter) *rateLimiter {
	r := rateLimiter{}
	if old != nil {
		r = *old
	}
	if update.Bandwidth != nil {
		r.Bandwidth = update.Bandwidth
	}
	if update.Ops != nil {
		r.Ops = update.Ops
	}
	for _, b := range []**tokenBucket{&r.Bandwidth, &r.Ops} {
		if *b != nil && ((*b).Size == 0 || (*b).RefillM == 0) {
			*b = nil
		}
	}
	if r == (rateLimiter{}) {
		return nil
	}
	return &r
}

func (m *machine) deleteDrive(q *query) (any, error) {
	i := slices.IndexFunc(m.config.Drives, func(d drive) bool { return d.ID == q.id })
	if i < 0 {
		return notThere(m, q)
	}
	if m.config.Drives[i].Root {
		return nil, fail("Device hotplug error: cannot unplug the root device.")
	}
	m.config.Drives = slices.Delete(m.config.Drives, i, i+1)
	m.keep(m.files, q.id, nil)
	return nil, nil
}

func (m *machine) deleteNetwork(q *query) (any, error) {
	i := slices.IndexFunc(m.config.Networks, func(n netInterface) bool { return n.ID == q.id })
	if i < 0 {
		return notThere(m, q)
	}
	m.config.Networks = slices.Delete(m.config.Networks, i, i+1)
	m.keep(m.taps, q.id, nil)
	return nil, nil
}

func (m *machine) deletePmem(q *query) (any, error) {
	i := slices.IndexFunc(m.config.Pmem, func(p pmem) bool { return p.ID == q.id })
	if i < 0 {
		return notThere(m, q)
	}
	m.config.Pmem = slices.Delete(m.config.Pmem, i, i+1)
	return nil, nil
}

func (m *machine) putPmem(q *query) (any, error) {
	p := *q.body.(*pmem)
	f, err := openBacking(p.Path, p.ReadOnly)
	if err != nil {
		return nil, fail("Pmem error: %s", err)
	}
	defer f.Close()
	if info, err := f.Stat(); err != nil || info.Size() == 0 {
		return nil, fail("Pmem error: the backing file is empty.")
	}
	m.config.Pmem = replace(m.config.Pmem, p, func(o pmem) bool { return o.ID == p.ID })
	return nil, nil
}

func (m *machine) putNetwork(q *query) (any, error) {
	n := *q.body.(*netInterface)
	if m.state != notStarted && slices.ContainsFunc(m.config.Networks, func(o netInterface) bool { return o.ID == n.ID }) {
		return nil, fail("Device hotplug error: Device ID in use.")
	}
	if n.MAC != nil {
		if !isMAC(*n.MAC) {
			return nil, fail("An error occurred when deserializing the json body of a request: Invalid MAC address: %s.", *n.MAC)
		}
		for _, o := range m.config.Networks {
			if o.ID != n.ID && o.MAC != nil && strings.EqualFold(*o.MAC, *n.MAC) {
				return nil, fail("Network config error: The MAC address is already in use: %s", *n.MAC)
			}
		}
	}
	// The device of an interface that is configured again is gone before the new one is made.
	m.keep(m.taps, n.ID, nil)
	m.config.Networks = slices.DeleteFunc(m.config.Networks, func(o netInterface) bool { return o.ID == n.ID })
	tap, err := m.openTAP(n.TAP)
	if err != nil {
		return nil, fail("Network config error: Could not create the network device: %s", err)
	}
	if n.MTU != nil && *n.MTU < 68 {
		_ = tap.Close()
		return nil, fail("Network config error: Invalid MTU: %d", *n.MTU)
	}
	m.keep(m.taps, n.ID, tap)
	m.config.Networks = append(m.config.Networks, n)
	return nil, nil
}

func isMAC(text string) bool {
	groups := strings.Split(text, ":")
	return len(groups) == 6 && !slices.ContainsFunc(groups, func(g string) bool {
		return len(g) != 2 || strings.Trim(g, "0123456789abcdefABCDEF") != ""
	})
}

// openTAP attaches to a TAP device, as the VMM does: it is made when it is not there, and one that is held is busy.
func (m *machine) openTAP(name string) (*os.File, error) {
	if m.faults.NoTAP {
		return nil, nil
	}
	request, err := unix.NewIfreq(name)
	if err != nil {
		return nil, fail("Open tap device failed: Invalid interface name")
	}
	fd, err := unix.Open("/dev/net/tun", unix.O_RDWR|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fail("Open tap device failed: Couldn't open /dev/net/tun: %s", osError(err))
	}
	request.SetUint16(unix.IFF_TAP | unix.IFF_NO_PI | unix.IFF_VNET_HDR)
	if err := unix.IoctlIfreq(fd, unix.TUNSETIFF, request); err != nil {
		_ = unix.Close(fd)
		return nil, fail("Open tap device failed: Error while creating ifreq structure: %s. Invalid TUN/TAP Backend provided by %s.", osError(err), name)
	}
	return os.NewFile(uintptr(fd), name), nil
}

func (m *machine) patchNetwork(q *query) (any, error) {
	u := q.body.(*netUpdate)
	for i := range m.config.Networks {
		if n := &m.config.Networks[i]; n.ID == u.ID {
			if u.RX != nil {
				n.RX = merged(n.RX, u.RX)
			}
			if u.TX != nil {
				n.TX = merged(n.TX, u.TX)
			}
			return nil, nil
		}
	}
	return nil, fail("Network config error: no interface with id %s.", u.ID)
}

func (m *machine) putVsock(q *query) (any, error) {
	c := *q.body.(*vsockConfig)
	if m.vsock != nil {
		m.vsock.close()
		_ = os.Remove(m.config.Vsock.Path) // the one thing of its own that it ever removes
		m.vsock, m.config.Vsock = nil, nil
	}
	v, err := listenVsock(m, c.Path)
	if err != nil {
		return nil, fail("Vsock config error: %s", err)
	}
	c.DeprecatedID = nil
	m.vsock, m.config.Vsock = v, &c
	return nil, nil
}

func (m *machine) putEntropy(q *query) (any, error) {
	m.config.Entropy = q.body.(*entropy)
	return nil, nil
}

func (m *machine) putBalloon(q *query) (any, error) {
	b := q.body.(*balloon)
	if uint64(b.AmountMiB) > m.config.Machine.MemoryMiB {
		return nil, fail("Balloon config error: Amount of pages requested is too large.")
	}
	m.config.Balloon = b
	return nil, nil
}

var errNoBalloon = fail("Balloon config error: No balloon device found.")

// activeBalloon is there once the guest's driver is.
func (m *machine) activeBalloon() (*balloon, error) {
	if m.config.Balloon == nil {
		return nil, errNoBalloon
	}
	if !m.guest.up() {
		return nil, fail("Balloon config error: Device is inactive, not activated yet.")
	}
	return m.config.Balloon, nil
}

func (m *machine) patchBalloon(q *query) (any, error) {
	b, err := m.activeBalloon()
	if err != nil {
		return nil, err
	}
	amount := q.body.(*balloonUpdate).AmountMiB
	if uint64(amount) > m.config.Machine.MemoryMiB {
		return nil, fail("Balloon config error: Amount of pages requested is too large.")
	}
	b.AmountMiB = amount
	return nil, nil
}

func (m *machine) patchBalloonStats(q *query) (any, error) {
	b, err := m.activeBalloon()
	if err != nil {
		return nil, err
	}
	interval := q.body.(*balloonStatsUpdate).Interval
	if (interval == 0) != (b.Interval == 0) {
		return nil, fail("Balloon config error: Statistics for the balloon device cannot be enabled or disabled after activation.")
	}
	b.Interval = interval
	return nil, nil
}

func (m *machine) getBalloon(*query) (any, error) {
	switch {
	case m.config.Balloon != nil:
		return m.config.Balloon, nil
	case m.state != notStarted: // seen of 1.16.1; its documentation knows one text only
		return nil, fail("Internal VMM error: Failed perform action on device: Device not found")
	}
	return nil, errNoBalloon
}

// getBalloonStats answers before the guest's driver is active, too: seen of 1.16.1, against its documentation.
func (m *machine) getBalloonStats(*query) (any, error) {
	b := m.config.Balloon
	switch {
	case b == nil:
		return nil, errNoBalloon
	case b.Interval == 0:
		return nil, fail("Balloon config error: Statistics for the balloon device are not enabled")
	}
	actual := uint32(0)
	if m.guest.up() {
		actual = b.AmountMiB
	}
	const pages = 256 // in a MiB
	return map[string]uint32{
		"target_pages": b.AmountMiB * pages, "actual_pages": actual * pages, "target_mib": b.AmountMiB, "actual_mib": actual,
	}, nil
}

// hinting is one of PATCH /balloon/hinting/start and /stop, and of GET /balloon/hinting/status.
func (m *machine) hinting(*query) (any, error) {
	b, err := m.activeBalloon()
	if err != nil {
		return nil, err
	}
	if !b.Hinting {
		return nil, fail("Balloon config error: Free page hinting is not enabled.")
	}
	return nil, nil
}

func (m *machine) hintingStatus(q *query) (any, error) {
	if _, err := m.hinting(q); err != nil {
		return nil, err
	}
	return map[string]*uint32{"host_cmd": new(uint32), "guest_cmd": nil}, nil
}

func (m *machine) putHotplug(q *query) (any, error) {
	h := q.body.(*memoryHotplug)
	block, slot := uint32(2), uint32(128)
	set(&block, h.Block)
	set(&slot, h.Slot)
	switch {
	case block < 2 || block&(block-1) != 0, slot < 128 || slot%block != 0, h.Total < slot || h.Total%slot != 0:
		return nil, fail("Memory hotplug error: the sizes do not fit: total %d, slot %d, block %d.", h.Total, slot, block)
	}
	m.config.Hotplug = &memoryHotplug{Total: h.Total, Block: &block, Slot: &slot}
	return nil, nil
}

func (m *machine) putMMDSConfig(q *query) (any, error) {
	c := q.body.(*mmdsConfig)
	if len(c.Interfaces) == 0 {
		return nil, fail("MMDS config error: The list of network interface IDs provided is empty.")
	}
	for _, id := range c.Interfaces {
		if !slices.ContainsFunc(m.config.Networks, func(n netInterface) bool { return n.ID == id }) {
			return nil, fail("MMDS config error: The list of network interface IDs provided contains at least one ID that does not correspond to any existing network interface.")
		}
	}
	if c.Address != nil {
		ip, err := netip.ParseAddr(*c.Address)
		if err != nil || !ip.Is4() || !ip.IsLinkLocalUnicast() || ip.As4()[2] == 0 || ip.As4()[2] == 255 {
			return nil, fail("MMDS config error: The MMDS IPv4 address is not link local.")
		}
	}
	m.config.MMDS = c
	return nil, nil
}

// mmdsReady refuses the store of a machine that runs without one.
func (m *machine) mmdsReady() error {
	if m.state != notStarted && m.config.MMDS == nil {
		return fail("The MMDS data store is not initialized.")
	}
	return nil
}

func (m *machine) putMMDS(q *query) (any, error) {
	if err := m.mmdsReady(); err != nil {
		return nil, err
	}
	return nil, m.storeMMDS(*q.body.(*json.RawMessage))
}

func (m *machine) storeMMDS(document json.RawMessage) error {
	if len(document) > m.mmdsLimit {
		return rejected{413, "The MMDS patch request doesn't fit: the data store's size limit is exceeded."}
	}
	m.mmds = document
	return nil
}

func (m *machine) patchMMDS(q *query) (any, error) {
	if err := m.mmdsReady(); err != nil {
		return nil, err
	}
	if m.mmds == nil {
		return nil, fail("The MMDS data store is not initialized.")
	}
	var old, patch any
	if err := errors.Join(json.Unmarshal(m.mmds, &old), json.Unmarshal(*q.body.(*json.RawMessage), &patch)); err != nil {
		return nil, err
	}
	text, err := json.Marshal(mergePatch(old, patch))
	if err != nil {
		return nil, err
	}
	return nil, m.storeMMDS(text)
}

// mergePatch is that of RFC 7396.
func mergePatch(old, patch any) any {
	p, ok := patch.(map[string]any)
	if !ok {
		return patch
	}
	o, ok := old.(map[string]any)
	if !ok {
		o = map[string]any{}
	}
	for name, v := range p {
		if v == nil {
			delete(o, name)
			continue
		}
		o[name] = mergePatch(o[name], v)
	}
	return o
}

func (m *machine) getMMDS(*query) (any, error) {
	if err := m.mmdsReady(); err != nil {
		return nil, err
	}
	if m.mmds == nil {
		return struct{}{}, nil
	}
	return m.mmds, nil
}
