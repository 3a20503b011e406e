package helper

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net/netip"
	"os"
	"strings"
	"syscall"

	"banger/internal/fault"
)

// allowedFile lets the administrator of a host with several users say which subnets they may have: one a line. A bridge
// draws the traffic of all users to its subnet, also where no route names it and the default route would have led
// there. Without the file every private subnet that no route names can be had.
const allowedFile = "/etc/banger/subnets"

// maxAllowedFile bounds what is read of it.
const maxAllowedFile = 64 << 10

// allowance is which subnets users may have; nil is all.
type allowance []netip.Prefix

// readAllowance reads the file, which must be root's alone to write.
func readAllowance(path string) (allowance, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot read which subnets are allowed").WithHint("let everybody read it: sudo chmod 0644 %s", path)
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if owner, ok := info.Sys().(*syscall.Stat_t); !ok || owner.Uid != 0 || info.Mode().Perm()&0o022 != 0 {
		return nil, fault.New(fault.Precondition, "%s is not root's alone to write", path).WithHint("sudo chown root %s && sudo chmod 0644 %s", path, path)
	}
	text, err := io.ReadAll(io.LimitReader(f, maxAllowedFile))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	a := allowance{}
	for line := range strings.Lines(string(text)) {
		line, _, _ = strings.Cut(line, "#")
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		p, err := netip.ParsePrefix(line)
		if err != nil || !p.Addr().Is4() {
			return nil, fault.New(fault.Precondition, "%s: %q is no IPv4 subnet", path, line).WithHint("write one subnet a line, such as 172.30.0.0/16")
		}
		a = append(a, p.Masked())
	}
	return a, nil
}

// check refuses a user a subnet that is not within an allowed one. Root may have any.
func (a allowance) check(address netip.Prefix, uid int) error {
	if a == nil || uid == 0 {
		return nil
	}
	for _, p := range a {
		if p.Bits() <= address.Bits() && p.Contains(address.Addr()) {
			return nil
		}
	}
	return fault.New(fault.Precondition, "subnet %s is not allowed on this host", address.Masked()).
		WithHint("set network.subnet in config.toml to one of %s", allowedFile)
}
