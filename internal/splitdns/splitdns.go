// Package splitdns makes the host's own resolver send questions about the zone vm to banger, and no others. It knows
// systemd-resolved, NetworkManager's dnsmasq and a dnsmasq of its own. It adds one file to the resolver's configuration,
// which is what taking it back removes; resolv.conf is never touched.
package splitdns

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"

	"github.com/google/renameio/v2"

	"banger/internal/fault"
)

// mark is the first line of a file of ours: what does not begin so is somebody else's.
const mark = "# Written by banger: names below .vm are asked of banger. Remove it with: banger dns uninstall\n"

// Host is the machine whose resolver is set up.
type Host struct {
	Root string // "/", or that of a test
	// Run runs a program to its end and returns its output.
	Run func(ctx context.Context, argv ...string) ([]byte, error)
}

// Method is a resolver and how it is told.
type Method struct {
	Name  string // "systemd-resolved", "networkmanager" or "dnsmasq"
	File  string // what is added, below the root
	apply []string
	text  func(server netip.AddrPort) string
	// blocked tells why the file would do harm here; nil: it would not.
	blocked func(h Host) error
}

// Directories of drop-ins.
const (
	delegateFile = "etc/systemd/dns-delegate.d/banger.dns-delegate" // systemd.dns-delegate(5), systemd 258
	resolvedFile = "etc/systemd/resolved.conf.d/banger.conf"        // resolved.conf(5)
	managerFile  = "etc/NetworkManager/dnsmasq.d/banger.conf"       // NetworkManager.conf(5), dns=dnsmasq
	dnsmasqFile  = "etc/dnsmasq.d/banger.conf"                      // dnsmasq(8), conf-dir
)

var resolvedApply = []string{"systemctl", "try-restart", "systemd-resolved.service"}

func methods() []Method {
	return []Method{
		{Name: "systemd-resolved", File: delegateFile, apply: resolvedApply, text: func(s netip.AddrPort) string {
			return "[Delegate]\nDNS=" + s.String() + "\nDomains=vm\n"
		}},
		{Name: "systemd-resolved", File: resolvedFile, apply: resolvedApply, blocked: Host.globalServers, text: func(s netip.AddrPort) string {
			return "[Resolve]\nDNS=" + s.String() + "\nDomains=~vm\n"
		}},
		{Name: "networkmanager", File: managerFile, apply: []string{"nmcli", "general", "reload", "dns-full"}, text: dnsmasqText},
		{Name: "dnsmasq", File: dnsmasqFile, apply: []string{"systemctl", "try-restart", "dnsmasq.service"}, text: dnsmasqText},
	}
}

// dnsmasqText lets answers with private addresses through, which stop-dns-rebind would take for an attack.
func dnsmasqText(s netip.AddrPort) string {
	return "server=/vm/" + s.Addr().String() + "#" + portOf(s) + "\nrebind-domain-ok=/vm/\n"
}

func portOf(s netip.AddrPort) string {
	text := s.String()
	return text[strings.LastIndex(text, ":")+1:]
}

func (m Method) content(server netip.AddrPort) []byte { return []byte(mark + m.text(server)) }

// Result is what Install or Uninstall did.
type Result struct {
	Method  string
	Files   []string // absolute
	Changed bool
}

// Status is what is in place.
type Status struct {
	Method    string   // the resolver that this host uses; empty: none that is known
	Installed bool     // its file is there and says what it should
	Files     []string // files of ours, absolute
	Problem   string   // why nothing can be installed, or what is wrong with what is
}

// Install adds our file to the resolver's configuration. A Precondition fault says that this host's resolver is not
// known, that rights are missing, or that the resolver does not start with it: then all is as before. A Conflict fault
// says that it would do harm.
func (h Host) Install(ctx context.Context, server netip.AddrPort) (Result, error) {
	m, err := h.detect(ctx)
	if err != nil {
		return Result{}, err
	}
	result := Result{Method: m.Name, Files: []string{h.path(m.File)}}
	if m.blocked != nil {
		if err := m.blocked(h); err != nil {
			return result, err
		}
	}
	have, err := os.ReadFile(h.path(m.File))
	switch {
	case err == nil && bytes.Equal(have, m.content(server)):
		return result, nil
	case err == nil && !bytes.HasPrefix(have, []byte(mark)):
		return result, fault.New(fault.Conflict, "%s exists and was not written by banger", h.path(m.File)).WithHint("look at it, and move it away")
	}
	if err := h.write(m.File, m.content(server)); err != nil {
		return result, rights(err, "cannot write "+h.path(m.File), "banger dns install --server "+server.String())
	}
	result.Changed = true
	err = h.apply(ctx, m)
	if err == nil || noProgram(err) {
		return result, err // without that program somebody else starts the resolver anew: the file waits
	}
	// The resolver may be down now, and the host without names: as it was before, it ran.
	result.Changed = false
	return result, errors.Join(err, h.putBack(context.WithoutCancel(ctx), m, have))
}

// putBack makes the method's file what it was, nil for none, and lets the resolver read that.
func (h Host) putBack(ctx context.Context, m Method, before []byte) error {
	if before != nil {
		if err := h.write(m.File, before); err != nil {
			return rights(err, "cannot write "+h.path(m.File), "banger dns uninstall")
		}
		return h.apply(ctx, m)
	}
	_, err := h.remove(ctx, m)
	return err
}

// Uninstall removes the files of ours, of whatever resolver.
func (h Host) Uninstall(ctx context.Context) (Result, error) {
	var result Result
	var errs []error
	for _, m := range methods() {
		if !h.ours(m) {
			continue
		}
		result.Method, result.Files = m.Name, append(result.Files, h.path(m.File))
		removed, err := h.remove(ctx, m)
		result.Changed = result.Changed || removed
		errs = append(errs, err)
	}
	return result, errors.Join(errs...)
}

// remove takes the method's file away and lets the resolver read what is left.
func (h Host) remove(ctx context.Context, m Method) (removed bool, err error) {
	if err := os.Remove(h.path(m.File)); err != nil {
		return false, rights(err, "cannot remove "+h.path(m.File), "banger dns uninstall")
	}
	h.removeIfMade(m)
	return true, h.apply(ctx, m)
}

// Answers tells whether this host's programs find the zone vm: whether the resolver of resolv.conf asks banger for it.
func Answers(ctx context.Context) bool {
	servers, err := (&net.Resolver{PreferGo: true}).LookupNS(ctx, "vm.")
	return err == nil && len(servers) == 1 && servers[0].Host == "vm." // as dns.Server says, and no other
}

// Status tells what is in place. It needs no rights and changes nothing.
func (h Host) Status(ctx context.Context, server netip.AddrPort) Status {
	var s Status
	for _, m := range methods() {
		if h.ours(m) {
			s.Files = append(s.Files, h.path(m.File))
		}
	}
	m, err := h.detect(ctx)
	if err != nil {
		s.Problem = err.Error()
		return s
	}
	s.Method = m.Name
	have, err := os.ReadFile(h.path(m.File))
	s.Installed = err == nil && bytes.Equal(have, m.content(server))
	switch {
	case s.Installed:
	case len(s.Files) > 0:
		s.Problem = "what is installed is of another resolver or another address"
	case m.blocked != nil:
		if err := m.blocked(h); err != nil {
			s.Problem = err.Error()
		}
	}
	return s
}

func (h Host) path(name string) string { return filepath.Join(h.Root, name) }

func (h Host) exists(name string) bool {
	_, err := os.Stat(h.path(name))
	return err == nil
}

// ours tells whether the method's file is there and is ours.
func (h Host) ours(m Method) bool {
	have, err := os.ReadFile(h.path(m.File))
	return err == nil && bytes.HasPrefix(have, []byte(mark))
}

// madeNote lies in a directory that was made for our file alone.
const madeNote = ".made-by-banger"

func (h Host) write(name string, text []byte) error {
	path := h.path(name)
	dir := filepath.Dir(path)
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		err := os.Mkdir(dir, 0o755)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, madeNote), nil, 0o644)
		}
		if err != nil {
			return err
		}
	}
	return renameio.WriteFile(path, text, 0o644, renameio.IgnoreUmask())
}

// removeIfMade removes the directory that was made for our file, unless others have come to use it.
func (h Host) removeIfMade(m Method) {
	dir := filepath.Dir(h.path(m.File))
	if err := os.Remove(filepath.Join(dir, madeNote)); err == nil {
		_ = os.Remove(dir) // fails when it is not empty, as it should
	}
}

func rights(err error, what, command string) error {
	f := fault.Wrap(fault.Precondition, err, "%s", what)
	if errors.Is(err, fs.ErrPermission) {
		return f.WithHint("the host's resolver is an administrator's: sudo %s", command)
	}
	return f
}

// noProgram tells that the program which lets a resolver read its configuration again is not there.
func noProgram(err error) bool { return fault.KindOf(errors.Unwrap(err)) == fault.Precondition }

func (h Host) apply(ctx context.Context, m Method) error {
	if _, err := h.Run(ctx, m.apply...); err != nil {
		return fault.Wrap(fault.Precondition, err, "%s has not read its configuration again", m.Name).
			WithHint("run: sudo %s", strings.Join(m.apply, " "))
	}
	return nil
}
