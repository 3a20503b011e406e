// Package paths holds every name banger gives to something on the host: files, sockets, network
// devices. docs/state.md explains the files; a test keeps the two equal.
package paths

import (
	"os"
	"path/filepath"

	"github.com/adrg/xdg"

	"banger/internal/bundle"
	"banger/internal/fault"
	"banger/internal/vm"
)

// MaxSocketPath is the longest path a Unix socket may have: sun_path holds 108 bytes with the
// closing NUL (unix(7)).
const MaxSocketPath = 107

// Names in the host's network.
const (
	Bridge    = "banger0" // the default bridge
	TAPPrefix = "bgr-"    // TAP devices of VMs that an earlier banger made, by the VM's id
	// PoolPrefix begins TAP devices' names: those of VMs, and those that wait for one.
	PoolPrefix = "tap-pool-"
	Subnet     = "172.30.0.0/16"

	DNSAddress = "127.0.0.1:42069" // where the host asks for names of VMs
)

// TAP returns the name that the TAP device of a VM had before there was a pool.
func TAP(id vm.ID) string { return TAPPrefix + string(id) }

// Paths are the directories of one user's banger.
type Paths struct {
	Config  string // directory of config.toml
	State   string // database, VMs, images, kernels, keys
	Cache   string // what can be made again
	Runtime string // the daemon's socket
}

// FromEnvironment returns the directories that the XDG base directory variables name, read now.
// Without XDG_RUNTIME_DIR the socket lies in the state directory.
func FromEnvironment() Paths {
	xdg.Reload()
	p := Paths{
		Config: filepath.Join(xdg.ConfigHome, "banger"),
		State:  filepath.Join(xdg.StateHome, "banger"),
		Cache:  filepath.Join(xdg.CacheHome, "banger"),
	}
	if dir := os.Getenv("XDG_RUNTIME_DIR"); dir != "" {
		p.Runtime = filepath.Join(dir, "banger")
	} else {
		p.Runtime = filepath.Join(p.State, "run")
	}
	return p
}

// Under returns directories below one root, for tests and for private instances.
func Under(root string) Paths {
	return Paths{
		Config: filepath.Join(root, "config"), State: filepath.Join(root, "state"),
		Cache: filepath.Join(root, "cache"), Runtime: filepath.Join(root, "run"),
	}
}

// Make creates the directories, private to the user.
func (p Paths) Make() error {
	for _, dir := range []string{p.Config, p.State, p.Cache, p.Runtime, p.VMs(), p.Images(), p.Kernels(), p.SSH()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return fault.Wrap(fault.Precondition, err, "cannot make directory %s", dir)
		}
	}
	return nil
}

// ConfigFile is the user's configuration.
func (p Paths) ConfigFile() string { return filepath.Join(p.Config, "config.toml") }

// BundleListing is the user's own manifest of where runtime bundles lie, read before the one that came with banger.
func (p Paths) BundleListing() string { return filepath.Join(p.Config, bundle.SourceFile) }

// Downloads keeps what is being downloaded, under its checksum.
func (p Paths) Downloads() string { return filepath.Join(p.Cache, "downloads") }

// Database is the SQLite file.
func (p Paths) Database() string { return filepath.Join(p.State, "banger.db") }

// Socket is where the daemon listens.
func (p Paths) Socket() string { return filepath.Join(p.Runtime, "bangerd.sock") }

// Lock is held by the one daemon of this state directory; it holds the daemon's pid.
func (p Paths) Lock() string { return filepath.Join(p.State, "bangerd.lock") }

// StartLock is held by a client while it starts or replaces the daemon.
func (p Paths) StartLock() string { return filepath.Join(p.Runtime, "start.lock") }

// DaemonLog is the daemon's log.
func (p Paths) DaemonLog() string { return filepath.Join(p.State, "bangerd.log") }

// DaemonOutput is what the daemon printed besides its log: why it could not start, or the trace of a
// crash. That of the run before has ".1" added.
func (p Paths) DaemonOutput() string { return filepath.Join(p.State, "bangerd.out") }

// HelperLog is what banger-nethelper says.
func (p Paths) HelperLog() string { return filepath.Join(p.State, "nethelper.log") }

// VMs holds a directory for each VM.
func (p Paths) VMs() string { return filepath.Join(p.State, "vms") }

// VM is a VM's own directory.
func (p Paths) VM(id vm.ID) string { return filepath.Join(p.VMs(), string(id)) }

// Images holds a directory for each image.
func (p Paths) Images() string { return filepath.Join(p.State, "images") }

// Builds holds the logs of image builds, and a note of each that is under way.
func (p Paths) Builds() string { return filepath.Join(p.State, "builds") }

// Kernels holds a directory for each kernel.
func (p Paths) Kernels() string { return filepath.Join(p.State, "kernels") }

// SSH holds the client key and the known hosts.
func (p Paths) SSH() string { return filepath.Join(p.State, "ssh") }

// SSHKey is banger's own client key; its public half has ".pub" added.
func (p Paths) SSHKey() string { return filepath.Join(p.SSH(), "id_ed25519") }

// SSHConfig is what ssh reads about VMs; ~/.ssh/config includes it.
func (p Paths) SSHConfig() string { return filepath.Join(p.SSH(), "config") }

// KnownHosts holds the host keys of all VMs.
func (p Paths) KnownHosts() string { return filepath.Join(p.SSH(), "known_hosts") }

// Seeds caches empty file systems that new disks are cloned from.
func (p Paths) Seeds() string { return filepath.Join(p.Cache, "seeds") }

// Initramfs caches initramfs archives by content hash.
func (p Paths) Initramfs() string { return filepath.Join(p.Cache, "initramfs") }

// Templates holds a directory for each template: VMs booted once that new ones are restored from.
func (p Paths) Templates() string { return filepath.Join(p.Cache, "templates") }

// Files of a VM's directory that the VMM does not name.
const (
	OverlayDisk   = "overlay.ext4"
	WorkDisk      = "work.ext4"
	VMInitramfs   = "initramfs.img" // base initramfs and guest config; only while it starts
	Suspended     = "suspended"     // directory: the memory of a suspended VM
	SuspendedNew  = "suspended.new" // the same while it is written
	SuspendedDisk = "disks.json"    // in it: the disks that the memory belongs to
	Snapshots     = "snapshots"     // directory: one for each snapshot, by tag
	RevertNew     = "revert.new"    // what a snapshot is gone back to with, until it is in place
	Forked        = "forked"        // directory: the memory that this VM and its siblings go on from; only while they are forked
	SSHHostKey    = "ssh_host_ed25519_key"
	SSHHostKeyPub = "ssh_host_ed25519_key.pub"
)

// Program finds a program of ours that users do not call: where BANGER_RUNTIME_DIR says, beside the running one in a
// build directory, or in the runtime directory: ../lib/banger of an installed program, ../runtime of a source checkout. A
// Precondition fault says that it is nowhere.
func Program(name string) (string, error) {
	path, found, err := bundle.Helper(name)
	switch {
	case err != nil:
		return "", err
	case found:
		return path, nil
	}
	dir, err := bundle.SelfDir()
	if err != nil {
		return "", err
	}
	return "", fault.New(fault.Precondition, "the program %s is missing beside those in %s", name, dir).
		WithHint("build and install all of banger: make install")
}

// CheckSocket refuses a socket path that the kernel would cut short.
func CheckSocket(path string) error {
	if len(path) <= MaxSocketPath {
		return nil
	}
	return fault.New(fault.Precondition, "socket path is %d bytes long, the most is %d: %s",
		len(path), MaxSocketPath, path).
		WithHint("set XDG_RUNTIME_DIR to a directory with a shorter path")
}
