package fakefc

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc64"
	"io"
	"net"
	"os"
	"slices"

	"banger/internal/vmm/fakeguest"
)

// saved is what a state file holds, as a line of JSON; its CRC64 follows.
type saved struct {
	Magic  string `json:"magic"`
	Format string `json:"format"`
	Config config `json:"config"`
	PCI    bool   `json:"pci"`
}

const (
	magic    = "fake Firecracker, x86_64"
	maxState = 10 << 20
)

var table = crc64.MakeTable(crc64.ECMA)

func (m *machine) createSnapshot(q *query) (any, error) {
	c := q.body.(*snapshotCreate)
	if m.state != paused {
		return nil, fail("Create snapshot error: Cannot perform an operation on the microVM: save/restore unavailable while running.")
	}
	if slices.ContainsFunc(m.config.Drives, func(d drive) bool { return d.Socket != nil }) {
		return nil, fail("Create snapshot error: a device without snapshot support is attached.")
	}
	text, err := json.Marshal(saved{Magic: magic, Format: m.version.format(), Config: m.config, PCI: m.pci})
	if err != nil {
		return nil, err
	}
	text = binary.LittleEndian.AppendUint64(append(text, '\n'), crc64.Checksum(text, table))
	if err := writeState(c.State, text); err != nil {
		return nil, fail("Create snapshot error: Cannot write the snapshot file: %s", osError(err))
	}
	if err := m.writeMemory(c.Memory); err != nil {
		return nil, fail("Create snapshot error: Cannot write the memory file: %s", osError(err))
	}
	m.guest.saved = true
	return nil, nil
}

func writeState(path string, text []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o644)
	if err != nil {
		return err
	}
	_, err = f.Write(text)
	return errors.Join(err, f.Sync(), f.Close())
}

// writeMemory makes a file of the memory's size, with what the guest has in mind at its beginning: a length and JSON.
// A file that has the size is written over, in place.
func (m *machine) writeMemory(path string) error {
	text, err := m.guest.memory.Save()
	if err != nil {
		return err
	}
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return err
	}
	size := int64(m.config.Machine.MemoryMiB) << 20
	if info, serr := f.Stat(); serr == nil && info.Size() != size {
		err = errors.Join(f.Truncate(0), f.Truncate(size))
	}
	if err == nil {
		_, err = f.WriteAt(append(binary.LittleEndian.AppendUint64(nil, uint64(len(text))), text...), 0)
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// loadSnapshot restores a machine. Once the body is right and the process fresh, an error ends the process.
func (m *machine) loadSnapshot(q *query) (any, error) {
	l := q.body.(*snapshotLoad)
	if (l.Backend == nil) == (l.Memory == nil) {
		return nil, fail("Load snapshot error: exactly one of `mem_backend` and `mem_file_path` must be there.")
	}
	if m.configured {
		return nil, fail("Load snapshot error: Loading a microVM snapshot not allowed after configuring boot-specific resources.")
	}
	q.fatal = true
	if err := m.load(l); err != nil {
		return nil, fail("Load snapshot error: %s", err)
	}
	m.state = paused
	if l.Resume {
		m.resume()
	}
	return nil, nil
}

func (m *machine) load(l *snapshotLoad) error {
	s, err := m.readState(l.State)
	if err != nil {
		return fail("Failed to restore from snapshot: Failed to get snapshot state from file: %s", err)
	}
	if m.faults.KVM != 0 {
		return errKVM(m.faults.KVM)
	}
	memory, err := readBackend(l, int64(s.Config.Machine.MemoryMiB)<<20)
	if err != nil {
		return err
	}
	if err := m.override(l, &s.Config); err != nil {
		return err
	}
	m.config, m.pci = s.Config, s.PCI
	if err := m.reopen(); err != nil {
		return err
	}
	m.guest = guestOf(m, memory)
	m.guest.clock.Set(true)
	m.guest.saved = true
	m.vsock.activate(m.guest)
	m.guest.ready.Store(true)
	go m.guest.run()
	return nil
}

func (m *machine) readState(path string) (saved, error) {
	var s saved
	f, err := os.Open(path)
	if err != nil {
		return s, fail("Cannot open the snapshot file: %s", osError(err))
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxState))
	if err != nil {
		return s, failure(osError(err))
	}
	end := len(text) - 9
	if end < 0 {
		return s, fail("the snapshot file is too short")
	}
	if err := json.NewDecoder(bytes.NewReader(text)).Decode(&s); err != nil || s.Magic != magic {
		return s, fail("Magic value does not match")
	}
	if s.Format != m.version.format() {
		return s, fail("Invalid format version %s: this is %s", s.Format, m.version.format())
	}
	if binary.LittleEndian.Uint64(text[end+1:]) != crc64.Checksum(text[:end], table) {
		return s, fail("Crc64 check failed")
	}
	return s, nil
}

func readBackend(l *snapshotLoad, size int64) (*fakeguest.Memory, error) {
	path := ""
	switch {
	case l.Memory != nil:
		path = *l.Memory
	case l.Backend.Type == "Uffd":
		c, err := net.Dial("unix", l.Backend.Path)
		if err != nil {
			return nil, fail("Failed to UDS connect to the uffd handler: %s", osError(err))
		}
		_ = c.Close()
		return nil, fail("Failed to restore guest memory by uffd: this one has no memory of its own")
	default:
		path = l.Backend.Path
	}
	if l.HugePages == "2M" {
		return nil, fail("Cannot restore hugetlbfs backed snapshot by mapping the memory file. Please use uffd.")
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fail("Failed to restore guest memory: Cannot open the memory file: %s", osError(err))
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil || info.Size() < size {
		return nil, fail("Failed to restore guest memory: the file offset is beyond the end of the memory file")
	}
	head := make([]byte, 8)
	if _, err := f.ReadAt(head, 0); err != nil {
		return nil, failure(osError(err))
	}
	text, err := io.ReadAll(io.NewSectionReader(f, 8, min(size, int64(binary.LittleEndian.Uint64(head)&0xffffffff))))
	if err != nil {
		return nil, failure(osError(err))
	}
	memory, err := fakeguest.Load(text)
	if err != nil {
		return nil, fail("the guest crashes on its damaged memory: %s", err)
	}
	return memory, nil
}

// override puts other names into what was saved.
func (m *machine) override(l *snapshotLoad, c *config) error {
	for _, o := range l.Networks {
		i := slices.IndexFunc(c.Networks, func(n netInterface) bool { return n.ID == o.ID })
		if i < 0 {
			return fail("Unknown Network Device %s", o.ID)
		}
		c.Networks[i].TAP = o.TAP
	}
	if l.Vsock != nil {
		if c.Vsock == nil {
			return fail("Unknown Vsock Device: there is none in the snapshot")
		}
		c.Vsock.Path = l.Vsock.Path
	}
	return nil
}

// reopen takes hold of what the snapshot names.
func (m *machine) reopen() error {
	for _, d := range m.config.Drives {
		f, err := openBacking(*d.Path, d.readOnly())
		if err != nil {
			return fail("Block: Virtio backend error: %s", err)
		}
		m.files[d.ID] = f
	}
	for _, n := range m.config.Networks {
		tap, err := m.openTAP(n.TAP)
		if err != nil {
			return fail("Net: %s", err)
		}
		m.taps[n.ID] = tap
	}
	if m.config.Vsock == nil {
		return nil
	}
	v, err := listenVsock(m, m.config.Vsock.Path)
	if err != nil {
		return fail("Vsock: %s", err)
	}
	m.vsock = v
	return nil
}
