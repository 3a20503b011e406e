package machine

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
	"time"

	"github.com/google/renameio/v2"

	"banger/internal/fault"
	"banger/internal/fileio"
	"banger/internal/vmm"
)

// savedFormat is the version of the manifest and of what it stands for.
const savedFormat = 1

// maxManifest bounds what is read of a manifest, in bytes.
const maxManifest = 64 << 10

// Saved is the manifest of a saved machine: all that must be the same for it to be restored.
type Saved struct {
	Format      int         `json:"format"`
	Sum         uint32      `json:"sum,omitempty"` // CRC-32C of the manifest without it; 0: written before there was one
	VMM         string      `json:"vmm"`
	Build       string      `json:"build"` // the VMM's exact version
	Accelerator string      `json:"accelerator"`
	CPUModel    string      `json:"cpu_model,omitempty"` // of the host, when the guest sees it
	Layout      string      `json:"layout"`              // hash of the machine's devices and their places
	CPUs        int         `json:"cpus"`
	MemoryBytes int64       `json:"memory_bytes"`
	Disks       []SavedDisk `json:"disks"`
	DiskRate    int64       `json:"disk_rate,omitempty"` // as in vmm.Machine: a VMM may have saved its limits
	NetRate     int64       `json:"net_rate,omitempty"`
	State       SavedFile   `json:"state"`
	Memory      *SavedFile  `json:"memory,omitempty"` // nil: the memory is in the state
}

// SavedDisk is a disk as the guest knew it.
type SavedDisk struct {
	Role     string `json:"role"`
	Bytes    int64  `json:"bytes"`
	ReadOnly bool   `json:"read_only"`
}

// SavedFile is what shows that a file is still the one that was written. The state is summed up whole: it is
// read whole by the VMM anyway. A memory file is mapped and mostly never read: there the time has to do.
type SavedFile struct {
	Bytes    int64  `json:"bytes"`
	CRC32C   uint32 `json:"crc32c,omitempty"`
	Modified int64  `json:"modified_unix_nanos,omitempty"`
}

// WriteSaved makes the files in dir durable, and then the manifest s, completed with what the files are: a
// manifest without its files cannot be found after a crash of the host.
func WriteSaved(ctx context.Context, dir string, s Saved, mapped bool) error {
	s.Format = savedFormat
	var err error
	if s.State, err = settle(ctx, filepath.Join(dir, vmm.SavedState), true); err != nil {
		return cannotWrite(err, dir)
	}
	if mapped {
		memory, err := settle(ctx, filepath.Join(dir, vmm.SavedMemory), false)
		if err != nil {
			return cannotWrite(err, dir)
		}
		s.Memory = &memory
	}
	if s.Sum, err = s.sum(); err != nil {
		return err
	}
	text, err := json.MarshalIndent(s, "", "  ")
	if err != nil {
		return err
	}
	if err := renameio.WriteFile(filepath.Join(dir, vmm.SavedManifest), append(text, '\n'), 0o600); err != nil {
		return cannotWrite(err, dir)
	}
	return nil
}

// castagnoli is the polynomial that processors have an instruction for.
var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// sum is the manifest's checksum.
func (s Saved) sum() (uint32, error) {
	s.Sum = 0
	text, err := json.Marshal(s)
	return crc32.Checksum(text, castagnoli), err
}

func cannotWrite(err error, dir string) error {
	kind := fault.Precondition
	if errors.Is(err, context.Canceled) || errors.Is(err, context.DeadlineExceeded) {
		kind = fault.KindOf(err)
	}
	return fault.Wrap(kind, err, "cannot write the saved machine in %s", dir)
}

// settle waits until a file is on its disk and describes it.
func settle(ctx context.Context, path string, sum bool) (SavedFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return SavedFile{}, err
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return SavedFile{}, err
	}
	return describe(ctx, f, sum)
}

func describe(ctx context.Context, f *os.File, sum bool) (SavedFile, error) {
	info, err := f.Stat()
	if err != nil {
		return SavedFile{}, err
	}
	s := SavedFile{Bytes: info.Size()}
	if !sum {
		s.Modified = info.ModTime().UnixNano()
		return s, nil
	}
	crc := crc32.New(castagnoli)
	if _, err := io.CopyBuffer(crc, fileio.Until(ctx, f), make([]byte, 1<<20)); err != nil {
		return SavedFile{}, err
	}
	s.CRC32C = crc.Sum32()
	return s, nil
}

// RemoveSaved removes what a failed Save wrote. The memory file is the machine's and stays.
func RemoveSaved(dir string) error {
	var errs []error
	for _, name := range []string{vmm.SavedManifest, vmm.SavedState} {
		if err := os.Remove(filepath.Join(dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// ReadSaved reads the manifest in dir. What cannot be read or understood is a Precondition fault.
func ReadSaved(dir string) (Saved, error) {
	var s Saved
	text, err := readBounded(filepath.Join(dir, vmm.SavedManifest))
	if err == nil {
		err = json.Unmarshal(text, &s)
	}
	if err != nil {
		return s, fault.Wrap(fault.Precondition, err, "there is no complete saved machine in %s", dir)
	}
	if s.Format != savedFormat {
		return s, fault.New(fault.Precondition, "the saved machine in %s has format %d, not %d", dir, s.Format, savedFormat)
	}
	if sum, err := s.sum(); err != nil || s.Sum != 0 && s.Sum != sum {
		return s, fault.Wrap(fault.Precondition, err, "the saved machine in %s is damaged: the checksum of %s differs", dir, vmm.SavedManifest)
	}
	return s, nil
}

func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return io.ReadAll(io.LimitReader(f, maxManifest))
}

// Check compares the manifest in dir with what this host and m are, now, and with the files in dir. now is a
// manifest of the driver's without files and disks.
func (s Saved) Check(ctx context.Context, now Saved, m vmm.Machine, dir string) error {
	cannot := func(format string, args ...any) error {
		return fault.New(fault.Precondition, "the saved machine in %s cannot be restored as %s: %s",
			dir, m.Name, fmt.Sprintf(format, args...))
	}
	for _, c := range []struct{ what, saved, now string }{
		{"VMM", s.VMM, now.VMM},
		{"VMM version", s.Build, now.Build},
		{"accelerator", s.Accelerator, now.Accelerator},
		{"processor", s.CPUModel, now.CPUModel},
	} {
		if c.saved != c.now {
			return cannot("its %s was %q and is %q", c.what, c.saved, c.now)
		}
	}
	switch {
	case s.CPUs != m.CPUs:
		return cannot("it has %d CPUs, not %d", s.CPUs, m.CPUs)
	case s.MemoryBytes != m.MemoryBytes:
		return cannot("it has %d bytes of memory, not %d", s.MemoryBytes, m.MemoryBytes)
	}
	if why := s.checkDisks(m); why != "" {
		return cannot("%s", why)
	}
	if s.Layout != now.Layout {
		return cannot("its devices are not the same")
	}
	err := checkSavedFile(ctx, filepath.Join(dir, vmm.SavedState), s.State, true)
	if err == nil && s.Memory != nil {
		err = checkSavedFile(ctx, filepath.Join(dir, vmm.SavedMemory), *s.Memory, false)
	}
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return cannot("%v", err)
	}
	return nil
}

// checkDisks says why the disks of m do not fit. Writable ones may have grown.
func (s Saved) checkDisks(m vmm.Machine) string {
	if len(s.Disks) != len(m.Disks) {
		return fmt.Sprintf("it has %d disks, not %d", len(s.Disks), len(m.Disks))
	}
	for i, was := range s.Disks {
		d := m.Disks[i]
		bytes, err := DiskBytes(m.Dir, d)
		switch {
		case err != nil:
			return err.Error()
		case d.Role != was.Role || d.ReadOnly != was.ReadOnly:
			return fmt.Sprintf("its disk %d was %s, not %s", i, was.Role, d.Role)
		case bytes < was.Bytes || was.ReadOnly && bytes != was.Bytes:
			return fmt.Sprintf("its %s disk had %d bytes and has %d", was.Role, was.Bytes, bytes)
		}
	}
	return ""
}

// DiskBytes is the size of a disk of the machine in dir.
func DiskBytes(dir string, d vmm.Disk) (int64, error) {
	info, err := os.Stat(Absolute(dir, d.Path))
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// Absolute returns a path that may be relative to a machine's directory.
func Absolute(dir, path string) string {
	if filepath.IsAbs(path) {
		return path
	}
	return filepath.Join(dir, path)
}

func checkSavedFile(ctx context.Context, path string, want SavedFile, sum bool) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	// The size first: it costs nothing.
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if info.Size() != want.Bytes {
		return fmt.Errorf("%s has %d bytes, not %d", filepath.Base(path), info.Size(), want.Bytes)
	}
	got, err := describe(ctx, f, sum)
	switch {
	case err != nil:
		return err
	case got.CRC32C != want.CRC32C:
		return fmt.Errorf("%s is damaged: its checksum differs", filepath.Base(path))
	case got.Modified != want.Modified:
		return fmt.Errorf("%s was written to at %s", filepath.Base(path), time.Unix(0, got.Modified).UTC().Format(time.RFC3339))
	}
	return nil
}
