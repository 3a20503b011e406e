package supply

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"net/url"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"banger/internal/archive"
	"banger/internal/bundle"
	"banger/internal/download"
	"banger/internal/fault"
	"banger/internal/fileio"
	"banger/internal/system"
)

// Where Firecracker's releases lie: <base>/vX.Y.Z/firecracker-vX.Y.Z-<machine>.tgz, and beside each archive its checksum, with
// ".sha256.txt" added to the name. In the archive lie release-vX.Y.Z-<machine>/firecracker-vX.Y.Z-<machine>, the same for the jailer,
// and SHA256SUMS (tools/release.sh and tools/gh_release.py of the Firecracker repository).
const (
	FirecrackerReleases = "https://github.com/firecracker-microvm/firecracker/releases/download"
	FirecrackerVersion  = "1.16.1" // the newest when this was written: June 2026
)

const (
	partFirecracker  = "firecracker"
	firecrackerLimit = 1 << 30 // bytes of the archive, and of what is in it; a release has some 50 MB
	versionTimeout   = 10 * time.Second
)

// machines is what uname -m says, by Go's name.
var machines = map[string]string{"amd64": "x86_64", "arm64": "aarch64"}

var versionPattern = regexp.MustCompile(`^[0-9]{1,4}\.[0-9]{1,4}\.[0-9]{1,4}$`)

// FirecrackerOptions say which release. The zero value is the default version from its own place.
type FirecrackerOptions struct {
	Version string // X.Y.Z, a leading v is allowed; "" is FirecrackerVersion, or whichever From holds
	From    string // an archive that was downloaded by hand; "" downloads it
	SHA256  string // of the archive; "" takes the published one: from beside the archive
	BaseURL string // of the releases; "" is FirecrackerReleases
}

// InstallFirecracker puts Firecracker and its jailer into the runtime directory and returns the version. The archive's checksum is
// compared before anything is unpacked, those in it afterwards, and the program is asked for its version before it is put to use.
func (s *Store) InstallFirecracker(ctx context.Context, o FirecrackerOptions) (b bundle.Bundle, version string, err error) {
	machine := machines[runtime.GOARCH]
	if machine == "" {
		return b, "", fault.New(fault.Precondition, "there is no Firecracker for %s", runtime.GOARCH)
	}
	if o.Version = strings.TrimPrefix(o.Version, "v"); o.Version != "" && !versionPattern.MatchString(o.Version) {
		return b, "", fault.New(fault.Usage, "%q is no version of Firecracker", o.Version).WithHint("for instance %s", FirecrackerVersion)
	}
	address, err := o.address(machine)
	if err != nil {
		return b, "", err
	}
	sum, err := o.sum(ctx, address)
	if err != nil {
		return b, "", err
	}
	file, done, err := s.obtain(ctx, address, sum)
	if err != nil {
		return b, "", err
	}
	b, err = s.change(func(dir string) (c change, err error) {
		r := release{dir: dir, machine: machine}
		err = s.Sink.Run(stageUnpack, func() error { return r.unpack(ctx, file, o.Version) })
		if err == nil {
			err = s.Sink.Run(stageVerify, func() error { return r.verify(ctx) })
		}
		if err != nil {
			return c, err
		}
		version = r.version
		files, err := describe(ctx, dir)
		return change{
			manifest: bundle.Manifest{VMMs: map[string]string{"firecracker": "firecracker", "jailer": "jailer"}, Files: files},
			label:    version,
			source:   bundle.Source{Part: partFirecracker, Version: version, URL: address, SHA256: sum},
		}, err
	})
	if err == nil {
		done()
	}
	return b, version, err
}

// address returns the archive's URL or path.
func (o FirecrackerOptions) address(machine string) (string, error) {
	if o.From != "" && o.BaseURL != "" {
		return "", fault.New(fault.Usage, "an archive that is here and a place to fetch it from exclude each other").WithHint("leave --url out")
	}
	if o.From != "" {
		path, err := filepath.Abs(o.From)
		if err != nil {
			return "", fault.Wrap(fault.Precondition, err, "cannot find %s", o.From)
		}
		return path, nil
	}
	base, version := o.BaseURL, o.Version
	if base == "" {
		base = FirecrackerReleases
	}
	if version == "" {
		version = FirecrackerVersion
	}
	u, err := url.Parse(base)
	if err != nil || u.Host == "" {
		return "", fault.New(fault.Usage, "%q is no address of releases", base).WithHint("for instance %s", FirecrackerReleases)
	}
	if u.Scheme != "https" && o.SHA256 == "" && !isLoopback(u.Hostname()) {
		return "", fault.New(fault.Usage, "a checksum fetched from %s proves nothing", base).WithHint("use https://, or give the checksum with --sha256")
	}
	return u.JoinPath("v"+version, fmt.Sprintf("firecracker-v%s-%s.tgz", version, machine)).String(), nil
}

func isLoopback(host string) bool {
	ip := net.ParseIP(host)
	return host == "localhost" || ip != nil && ip.IsLoopback()
}

// sum returns the archive's checksum: the one that was given, or the one beside the archive.
func (o FirecrackerOptions) sum(ctx context.Context, address string) (string, error) {
	if o.SHA256 != "" {
		return o.SHA256, download.CheckSum(o.SHA256)
	}
	beside := address + ".sha256.txt"
	if o.From == "" {
		text, err := download.Text(ctx, beside, download.Options{})
		if err != nil {
			return "", err
		}
		return pickSum(text, beside, path.Base(address))
	}
	if _, err := fileio.Plain(address); err != nil {
		return "", err
	}
	text, err := os.ReadFile(beside)
	if errors.Is(err, fs.ErrNotExist) {
		return "", fault.New(fault.Precondition, "the published checksum of %s is missing", address).
			WithHint("put %s beside it, which lies beside the archive in the release, or give the checksum with --sha256", filepath.Base(beside))
	}
	if err != nil {
		return "", fault.Wrap(fault.Precondition, err, "cannot read the published checksum")
	}
	return pickSum(string(text), beside, filepath.Base(address))
}

// pickSum reads what sha256sum(1) writes: lines of a checksum and a name. A single line counts whatever its name: files
// are renamed when they are downloaded twice.
func pickSum(text, where, name string) (string, error) {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	for _, line := range lines {
		sum, listed, _ := strings.Cut(strings.TrimSpace(line), " ")
		listed = path.Base(strings.TrimLeft(listed, " *"))
		if (listed == name || len(lines) == 1) && download.CheckSum(sum) == nil {
			return sum, nil
		}
	}
	return "", fault.New(fault.Precondition, "%s holds no checksum of %s", where, name).
		WithHint("download both from the release again")
}

// release is an archive on its way into dir.
type release struct {
	dir, machine string
	version      string
}

var releaseNames = regexp.MustCompile(`^release-v([0-9.]+)-([0-9a-z_]+)/(firecracker|jailer)-v([0-9.]+)-([0-9a-z_]+)$`)

// unpack takes the two programs out of the archive, and their checksums.
func (r *release) unpack(ctx context.Context, file, version string) error {
	err := unpackFile(ctx, file, r.dir, archive.Limits{Bytes: firecrackerLimit, Files: 1000, Want: func(name string) bool {
		return releaseNames.MatchString(name) || path.Base(name) == "SHA256SUMS"
	}})
	if err != nil {
		return err
	}
	found, _ := filepath.Glob(filepath.Join(r.dir, "release-*", "firecracker-*")) // the pattern is valid
	if len(found) != 1 {
		return fault.New(fault.Precondition, "this is no archive of a Firecracker release: it holds no release-vX.Y.Z-%s/firecracker-vX.Y.Z-%s", r.machine, r.machine).
			WithHint("take firecracker-vX.Y.Z-%s.tgz from the release", r.machine)
	}
	inside, err := filepath.Rel(r.dir, found[0])
	if err != nil {
		return err
	}
	m := releaseNames.FindStringSubmatch(inside)
	if m == nil || m[1] != m[4] || m[2] != m[5] || !versionPattern.MatchString(m[1]) {
		return fault.New(fault.Precondition, "the archive holds %q, which is no name of a release", inside)
	}
	if m[2] != r.machine {
		return fault.New(fault.Precondition, "this Firecracker is for %s, this machine is %s", m[2], r.machine)
	}
	if version != "" && m[1] != version {
		return fault.New(fault.Precondition, "this is Firecracker %s, not %s", m[1], version).WithHint("leave --version out, or give the other archive")
	}
	r.version = m[1]
	return r.arrange(filepath.Dir(found[0]))
}

// arrange gives the programs their plain names, and compares them with SHA256SUMS of the release.
func (r *release) arrange(from string) error {
	text, err := os.ReadFile(filepath.Join(from, "SHA256SUMS"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fault.Wrap(fault.Precondition, err, "cannot read the checksums of the release")
	}
	for _, program := range []string{"firecracker", "jailer"} {
		long := fmt.Sprintf("%s-v%s-%s", program, r.version, r.machine)
		path := filepath.Join(from, long)
		if len(text) > 0 {
			sum, err := pickSum(string(text), "SHA256SUMS in the archive", long)
			if err == nil {
				err = checkFile(path, sum)
			}
			if err != nil {
				return err
			}
		}
		if err := os.Rename(path, filepath.Join(r.dir, program)); err != nil {
			return fault.Wrap(fault.Precondition, err, "the archive holds no %s", long)
		}
	}
	return os.RemoveAll(from)
}

// verify runs the programs: one for another machine, or another version than its name says, does not get into use.
func (r *release) verify(ctx context.Context) error {
	for _, program := range []string{"firecracker", "jailer"} {
		path := filepath.Join(r.dir, program)
		if err := os.Chmod(path, 0o755); err != nil {
			return fault.Wrap(fault.Precondition, err, "cannot make %s executable", program)
		}
		out, err := system.Run(ctx, system.Command{Path: path, Args: []string{"--version"}, Timeout: versionTimeout})
		if err != nil {
			return fault.Wrap(fault.Precondition, err, "this %s does not run here", program)
		}
		if first, _, _ := strings.Cut(string(out), "\n"); !strings.HasSuffix(strings.TrimSpace(first), " v"+r.version) {
			return fault.New(fault.Precondition, "this %s says that it is %q, not v%s", program, first, r.version)
		}
	}
	return nil
}
