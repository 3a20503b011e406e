package guest

import (
	"errors"
	"io"
	"os"
	"path/filepath"

	"github.com/cavaliergopher/cpio"
	"google.golang.org/protobuf/encoding/protojson"

	agentv1 "banger/api/agent/v1"
	"banger/internal/fault"
)

// ConfigPath is where the guest's init finds its config, below the root of the initramfs.
const ConfigPath = "banger/config.json"

// WriteInitramfs writes to out the initramfs base followed by a second archive with the guest
// config; the kernel unpacks both (Documentation/driver-api/early-userspace/buffer-format.rst). The
// file is private, because the config holds the SSH host key, and appears whole or not at all.
func WriteInitramfs(out, base string, cfg *agentv1.GuestConfig) error {
	config, err := protojson.Marshal(cfg)
	if err != nil {
		return err
	}
	in, err := os.Open(base)
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot read the initramfs").WithHint("make it again: banger setup --rebuild")
	}
	defer in.Close()
	f, err := os.CreateTemp(filepath.Dir(out), ".initramfs-*") // mode 0600
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write the initramfs")
	}
	// No flush: what a power cut loses is written again by the next start.
	size, err := io.Copy(f, in)
	if err == nil {
		err = appendConfig(f, size, config)
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(f.Name(), out)
	}
	if err != nil {
		return errors.Join(fault.Wrap(fault.Precondition, err, "cannot write the initramfs %s", out), os.Remove(f.Name()))
	}
	return nil
}

// appendConfig writes an archive with the config alone. Archives begin at multiples of four bytes;
// zeros between them mean nothing.
func appendConfig(w io.Writer, offset int64, config []byte) error {
	if _, err := w.Write(make([]byte, (4-offset%4)%4)); err != nil {
		return err
	}
	a := cpio.NewWriter(w)
	headers := []*cpio.Header{
		{Name: "banger", Mode: cpio.TypeDir | 0o700},
		{Name: ConfigPath, Mode: cpio.TypeReg | 0o600, Size: int64(len(config))},
	}
	for _, h := range headers {
		if err := a.WriteHeader(h); err != nil {
			return err
		}
	}
	if _, err := a.Write(config); err != nil {
		return err
	}
	return a.Close()
}
