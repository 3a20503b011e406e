// Package identity writes into a guest who it is: the files that name it, and its network. The init does so
// at every start, and the agent again when the guest was restored from memory as another VM.
package identity

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
)

// The lines between which a file is ours; the rest of it is the user's.
const (
	blockBegin = "# banger: begin (written at every start; your own lines go outside of it)"
	blockEnd   = "# banger: end"
)

// Write writes into the file system at root who the machine is and who may enter it: as much of it
// as can be written. The user is root there, and may have made a file immutable or put a directory in its place.
func Write(root string, cfg *agentv1.GuestConfig) error {
	return errors.Join(WriteNames(root, cfg), WriteKeys(root, cfg))
}

// WriteNames writes who the machine is and whom it asks for the names of others.
func WriteNames(root string, cfg *agentv1.GuestConfig) error {
	return each(
		func() error { return File(root, "etc/hostname", cfg.GetHostname()+"\n", 0o644) },
		func() error { return writeBlock(root, "etc/hosts", hostsLines(cfg), 0o644) },
		func() error { return writeMachineID(root, cfg.GetMachineId()) },
		func() error { return writeResolvers(root, cfg.GetNameservers()) },
		func() error { return writeTimezone(root, cfg.GetTimezone()) },
	)
}

// WriteKeys writes what sshd reads: by which key it is known, and whom it lets in.
func WriteKeys(root string, cfg *agentv1.GuestConfig) error {
	return each(
		func() error { return writeHostKey(root, cfg) },
		func() error { return writeAuthorizedKeys(root, cfg.GetAuthorizedKeys()) },
	)
}

// each takes all the steps and joins their failures.
func each(steps ...func() error) error {
	var errs []error
	for _, step := range steps {
		errs = append(errs, step())
	}
	return errors.Join(errs...)
}

// File makes text the content of the file, and only when it differs: what lies in the image is not copied up
// for nothing. A symlink is replaced, not followed.
func File(root, name, text string, mode fs.FileMode) error {
	path := filepath.Join(root, name)
	old, alike := read(path, mode)
	if alike && (old == text || overwrite(path, text, len(old)) == nil) {
		return nil
	}
	return replace(path, text, mode)
}

// read returns the text of a file, when there is one of that mode.
func read(path string, mode fs.FileMode) (text string, ok bool) {
	info, err := os.Lstat(path)
	if err != nil || info.Mode() != mode {
		return "", false
	}
	b, err := os.ReadFile(path)
	return string(b), err == nil
}

// overwrite changes a file in place, which takes the kernel a third of the work of another file in its place; to cut
// it off is half of the rest. One that was half written when the machine ended is written again at the next boot.
func overwrite(path, text string, before int) error {
	f, err := os.OpenFile(path, os.O_WRONLY|unix.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	if len(text) < before {
		err = errors.Join(err, f.Truncate(int64(len(text))))
	}
	return errors.Join(err, f.Close())
}

// replace puts a new file in the place of whatever is there.
func replace(path, text string, mode fs.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	temporary := path + ".banger"
	if err := os.WriteFile(temporary, []byte(text), mode); err != nil {
		return err
	}
	// The mode of WriteFile is lessened by the umask, and that of a left-over stays.
	if err := os.Chmod(temporary, mode); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	return nil
}

// writeBlock puts lines into the file as banger's block and leaves the rest of it alone.
func writeBlock(root, name string, lines []string, mode fs.FileMode) error {
	path := filepath.Join(root, name)
	old, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	text := withBlock(string(old), lines)
	alone := strings.HasPrefix(text, blockBegin+"\n") && strings.HasSuffix(text, "\n"+blockEnd+"\n")
	if alone || max(len(old), len(text)) <= blockSize {
		return File(root, name, text, mode)
	}
	if whole, ok := read(path, mode); ok && whole == text {
		return nil
	}
	return replace(path, text, mode) // nobody could write the user's lines again
}

// blockSize is what a disk takes at once: of a file that is no longer no line gets lost when it is changed in place.
const blockSize = 4096

// withBlock returns text with banger's block made of lines: in place of the one that is there, or at the end. A
// begin without an end is a plain line.
func withBlock(text string, lines []string) string {
	block := blockBegin + "\n"
	for _, l := range lines {
		block += strings.ReplaceAll(strings.TrimSpace(l), "\n", " ") + "\n"
	}
	block += blockEnd + "\n"
	if text != "" && !strings.HasSuffix(text, "\n") {
		text += "\n"
	}
	// Searched as whole lines: a leading newline makes the first line like the others.
	all := "\n" + text
	i := strings.Index(all, "\n"+blockBegin+"\n")
	if i < 0 {
		return text + block
	}
	before, rest := all[1:i+1], all[i+1:]
	j := strings.Index(rest, "\n"+blockEnd+"\n")
	if j < 0 {
		return text + block
	}
	return before + block + rest[j+len("\n"+blockEnd+"\n"):]
}

// hostsLines are the lines of /etc/hosts that banger answers for.
func hostsLines(cfg *agentv1.GuestConfig) []string {
	lines := []string{"127.0.0.1 localhost", "::1 localhost ip6-localhost ip6-loopback"}
	if name := cfg.GetHostname(); name != "" {
		lines = append(lines, ownAddress(cfg)+" "+name+".vm "+name)
	}
	for _, h := range cfg.GetHosts() {
		lines = append(lines, h.GetAddress()+" "+strings.Join(h.GetNames(), " "))
	}
	return lines
}

// ownAddress is the first address of the VM, or a loopback one when it has no network.
func ownAddress(cfg *agentv1.GuestConfig) string {
	for _, i := range cfg.GetInterfaces() {
		for _, a := range i.GetAddresses() {
			if p, err := netip.ParsePrefix(a); err == nil {
				return p.Addr().String()
			}
		}
	}
	return "127.0.1.1"
}

// writeMachineID writes the id also where D-Bus keeps one of its own; usually that is a link to systemd's.
func writeMachineID(root, id string) error {
	if id == "" {
		return nil
	}
	const dbus = "var/lib/dbus/machine-id"
	if info, err := os.Lstat(filepath.Join(root, dbus)); err == nil && info.Mode().IsRegular() {
		if err := File(root, dbus, id+"\n", 0o644); err != nil {
			return err
		}
	}
	return File(root, "etc/machine-id", id+"\n", 0o444)
}

// writeResolvers replaces resolv.conf; without name servers the image's own stays.
func writeResolvers(root string, servers []string) error {
	if len(servers) == 0 {
		return nil
	}
	var b bytes.Buffer
	for _, s := range servers {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	return File(root, "etc/resolv.conf", b.String(), 0o644)
}

// writeTimezone points /etc/localtime at the zone, when the image has it.
func writeTimezone(root, zone string) error {
	if zone == "" {
		return nil
	}
	if !filepath.IsLocal(zone) {
		return fmt.Errorf("%q is no time zone", zone)
	}
	target := filepath.Join("/usr/share/zoneinfo", zone)
	if _, err := os.Stat(filepath.Join(root, target)); err != nil {
		return nil // a small image without zones keeps UTC
	}
	return Link(root, "etc/localtime", target)
}

// Link makes name a symlink to target, whatever it was before.
func Link(root, name, target string) error {
	path := filepath.Join(root, name)
	if old, err := os.Readlink(path); err == nil && old == target {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	temporary := path + ".banger"
	if err := os.Remove(temporary); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, temporary); err != nil {
		return err
	}
	if err := os.Rename(temporary, path); err != nil {
		return errors.Join(err, os.Remove(temporary))
	}
	return nil
}

// writeHostKey writes the VM's SSH host key and tells sshd to use it alone: keys that lie in an image are
// shared by all its VMs.
func writeHostKey(root string, cfg *agentv1.GuestConfig) error {
	if cfg.GetSshHostKey() == "" {
		return nil
	}
	const key = "etc/ssh/ssh_host_ed25519_key"
	if err := File(root, key, newline(cfg.GetSshHostKey()), 0o600); err != nil {
		return err
	}
	if err := File(root, key+".pub", newline(cfg.GetSshHostKeyPublic()), 0o644); err != nil {
		return err
	}
	return File(root, "etc/ssh/sshd_config.d/00-banger.conf", "HostKey /"+key+"\n", 0o644)
}

func newline(s string) string { return strings.TrimRight(s, "\n") + "\n" }

// writeAuthorizedKeys lets the keys' owners in as root. The user's own lines stay.
func writeAuthorizedKeys(root string, keys []string) error {
	dir := filepath.Join(root, "root/.ssh")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	return writeBlock(root, "root/.ssh/authorized_keys", keys, 0o600)
}
