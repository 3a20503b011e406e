package capability

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/google/renameio/v2"

	"banger/internal/fault"
	"banger/internal/guest"
	"banger/internal/paths"
	"banger/internal/vm"
)

// sshKeys is the VM's host key, made once and known to the host, and the keys of those who may enter.
type sshKeys struct {
	o Options

	mu    sync.Mutex // also for the files below Paths.SSH
	hosts map[vm.ID]guest.KnownHost
}

type sshNote struct {
	Public string `json:"public"` // the host key, in authorized_keys form
}

func newSSHKeys(o Options) *sshKeys { return &sshKeys{o: o, hosts: map[vm.ID]guest.KnownHost{}} }

func (*sshKeys) Name() string       { return "ssh-keys" }
func (*sshKeys) Wants(vm.Spec) bool { return true }

func (c *sshKeys) Check(_ context.Context, v vm.VM) error {
	for _, k := range v.Spec.AuthorizedKeys {
		if err := guest.CheckAuthorizedKey(k); err != nil {
			return err
		}
	}
	return nil
}

func (c *sshKeys) Up(_ context.Context, v vm.VM, b *Build) (Note, error) {
	if b.Making { // a key that no VM has and nobody knows, so that sshd can start
		host, err := guest.NewKeyPair(v.DNSName())
		b.Guest.SshHostKey, b.Guest.SshHostKeyPublic = host.Private, host.Public
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	client, err := guest.EnsureKeyFile(c.o.Paths.SSHKey(), "banger")
	if err != nil {
		return nil, err
	}
	host, err := guest.EnsureKeyFile(filepath.Join(b.Machine.Dir, paths.SSHHostKey), v.DNSName())
	if err != nil {
		return nil, err
	}
	b.Guest.SshHostKey, b.Guest.SshHostKeyPublic = host.Private, host.Public
	b.Guest.AuthorizedKeys = slices.Concat([]string{client.Public}, v.Spec.AuthorizedKeys)
	before, had := c.hosts[v.ID]
	c.hosts[v.ID] = knownHost(v, host.Public)
	if had && before == c.hosts[v.ID] {
		return json.Marshal(sshNote{Public: host.Public})
	}
	if err := c.writeKnownHosts(); err != nil {
		delete(c.hosts, v.ID)
		return nil, err
	}
	return json.Marshal(sshNote{Public: host.Public})
}

// Down has nothing to take back: a host key is known as long as there is the VM.
func (*sshKeys) Down(context.Context, vm.VM) error { return nil }

// Erase forgets the host key; the key itself lies in the VM's directory.
func (c *sshKeys) Erase(_ context.Context, v vm.VM) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, ok := c.hosts[v.ID]; !ok {
		return nil
	}
	delete(c.hosts, v.ID)
	return c.writeKnownHosts()
}

// Sweep learns the host keys of all VMs and writes the file anew. What a daemon was writing when it
// died has a name with a dot in front, and is removed.
func (c *sshKeys) Sweep(_ context.Context, all []vm.VM) ([]string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	unfinished, err := filepath.Glob(filepath.Join(c.o.Paths.SSH(), ".*"))
	if err != nil {
		return nil, err
	}
	for _, name := range unfinished {
		if err := os.Remove(name); err != nil {
			return nil, fault.Wrap(fault.Precondition, err, "cannot tidy up the directory of SSH keys")
		}
	}
	clear(c.hosts)
	var errs []error
	for _, v := range all {
		var note sshNote
		if err := readNote(v, c.Name(), &note); err != nil {
			errs = append(errs, err) // the others stay known
			continue
		}
		if note.Public != "" {
			c.hosts[v.ID] = knownHost(v, note.Public)
		}
	}
	return nil, errors.Join(append(errs, c.writeKnownHosts())...)
}

func knownHost(v vm.VM, public string) guest.KnownHost {
	return guest.KnownHost{Alias: v.DNSName(), Addr: v.IP, Public: public}
}

// writeKnownHosts renders the whole file; the caller holds mu.
func (c *sshKeys) writeKnownHosts() error {
	all := make([]guest.KnownHost, 0, len(c.hosts))
	for _, h := range c.hosts {
		all = append(all, h)
	}
	if err := renameio.WriteFile(c.o.Paths.KnownHosts(), guest.KnownHosts(all), 0o600, renameio.IgnoreUmask()); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write the known hosts")
	}
	return nil
}
