// Package debian fetches Debian's packages without touching the host's own: apt works in a private
// root directory, checks the archive's signature, and nothing is installed. It runs without
// root rights.
package debian

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"banger/internal/fault"
	"banger/internal/system"
)

// Where Debian comes from unless said otherwise.
const (
	DefaultMirror = "http://deb.debian.org/debian"
	DefaultSuite  = "trixie" // Debian 13, stable

	securityMirror = "http://deb.debian.org/debian-security"
	fetchTimeout   = 20 * time.Minute
)

// Source is a release of Debian on a mirror. Empty fields mean the defaults.
type Source struct {
	Mirror       string
	Suite        string
	Architecture string // as Debian and Go both call it: amd64, arm64
}

// WithDefaults fills the empty fields; architecture is that of the host.
func (s Source) WithDefaults(architecture string) Source {
	if s.Mirror == "" {
		s.Mirror = DefaultMirror
	}
	if s.Suite == "" {
		s.Suite = DefaultSuite
	}
	if s.Architecture == "" {
		s.Architecture = architecture
	}
	return s
}

// Check refuses a source whose words would mean something else in apt's files.
func (s Source) Check() error {
	u, err := url.Parse(s.Mirror)
	if err != nil || u.Host == "" && u.Scheme != "file" || strings.ContainsAny(s.Mirror, " \t\n[]\"") {
		return fault.New(fault.Usage, "mirror %q is no URL", s.Mirror).WithHint("for instance %s", DefaultMirror)
	}
	for _, word := range []string{s.Suite, s.Architecture} {
		if word == "" || strings.ContainsAny(word, " \t\n[]\"/") {
			return fault.New(fault.Usage, "%q names no release or architecture of Debian", word)
		}
	}
	return nil
}

// Lines returns the source in the form of sources.list(5): the release, its updates, and from the
// default mirror the security updates as well. keyring is put into the lines unless it is "".
func (s Source) Lines(keyring string) []string {
	var options string
	if keyring != "" {
		options = "[signed-by=" + keyring + "] "
	}
	line := func(mirror, suite string) string { return "deb " + options + mirror + " " + suite + " main" }
	if s.Mirror != DefaultMirror {
		return []string{line(s.Mirror, s.Suite)}
	}
	return []string{line(s.Mirror, s.Suite), line(s.Mirror, s.Suite+"-updates"), line(securityMirror, s.Suite+"-security")}
}

// Keyring returns the file with the keys that Debian's archive is signed with.
func Keyring() (string, error) {
	const dir = "/usr/share/keyrings/"
	for _, name := range []string{"debian-archive-keyring.pgp", "debian-archive-keyring.gpg"} {
		if _, err := os.Stat(dir + name); err == nil {
			return dir + name, nil
		}
	}
	return "", fault.New(fault.Precondition, "the keys of Debian's archive are not installed").
		WithHint("apt install debian-archive-keyring")
}

// HostOptions returns the host's own settings of how apt reaches its mirrors (proxies, time limits), as
// lines of apt.conf(5).
func HostOptions(ctx context.Context) ([]string, error) {
	config, err := system.Find("apt-config", "apt")
	if err != nil {
		return nil, err
	}
	out, err := system.Run(ctx, system.Command{Path: config, Args: []string{"dump", "--format", `%F "%v";%n`, "Acquire"}})
	if err != nil {
		return nil, err
	}
	return hostOptions(string(out)), nil
}

func hostOptions(dump string) []string {
	var kept []string
	for line := range strings.Lines(dump) {
		line = strings.TrimSpace(line)
		name, value, _ := strings.Cut(line, " ")
		if value == `"";` || strings.Count(value, `"`) != 2 || strings.Contains(name, `"`) {
			continue
		}
		for _, prefix := range []string{"Acquire::http::", "Acquire::https::", "Acquire::Check-", "Acquire::ForceIPv", "Acquire::Retries"} {
			if strings.HasPrefix(strings.ToLower(name), strings.ToLower(prefix)) {
				kept = append(kept, line)
				break
			}
		}
	}
	return kept
}

// Apt is a private root of apt's.
type Apt struct {
	dir    string
	source Source
}

// OpenApt prepares a private root in dir, which may be one used before.
func OpenApt(ctx context.Context, dir string, source Source) (*Apt, error) {
	if err := source.Check(); err != nil {
		return nil, err
	}
	if strings.ContainsAny(dir, "\"\n") { // apt.conf(5) cannot say these
		return nil, fault.New(fault.Precondition, "apt cannot work in %q", dir).
			WithHint("set XDG_CACHE_HOME to a directory without double quotes in its name")
	}
	keyring, err := Keyring()
	if err != nil {
		return nil, err
	}
	options, err := HostOptions(ctx)
	if err != nil {
		return nil, err
	}
	for _, sub := range []string{"state/lists/partial", "cache/archives/partial", "etc", "packages"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return nil, fault.Wrap(fault.Precondition, err, "cannot make a directory for packages")
		}
	}
	a := &Apt{dir: dir, source: source}
	files := map[string]string{
		"apt.conf":          a.config(options),
		"etc/sources.list":  strings.Join(source.Lines(keyring), "\n") + "\n",
		"state/dpkg-status": "",
	}
	for name, content := range files {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600); err != nil {
			return nil, fault.Wrap(fault.Precondition, err, "cannot write %s", name)
		}
	}
	return a, nil
}

func (a *Apt) config(hostOptions []string) string {
	quoted := func(name, value string) string { return name + ` "` + value + `";` }
	in := func(name string) string { return filepath.Join(a.dir, name) }
	lines := append([]string{
		quoted("Dir", a.dir),
		quoted("Dir::Etc", in("etc")),
		quoted("Dir::Etc::sourcelist", in("etc/sources.list")),
		quoted("Dir::Etc::sourceparts", "/dev/null"),
		quoted("Dir::Etc::parts", "/dev/null"),
		quoted("Dir::Etc::main", "/dev/null"),
		quoted("Dir::State", in("state")),
		quoted("Dir::State::status", in("state/dpkg-status")),
		quoted("Dir::Cache", in("cache")),
		quoted("APT::Architecture", a.source.Architecture),
		quoted("APT::Architectures", a.source.Architecture),
		quoted("APT::Sandbox::User", "root"), // never another user, who could not read this directory
		quoted("Acquire::Languages", "none"),
		quoted("Acquire::Retries", "3"),
	}, hostOptions...)
	return strings.Join(lines, "\n") + "\n"
}

func (a *Apt) run(ctx context.Context, program string, args ...string) ([]byte, error) {
	path, err := system.Find(program, "apt")
	if err != nil {
		return nil, err
	}
	return system.Run(ctx, system.Command{
		Path: path, Args: args, Dir: filepath.Join(a.dir, "packages"), Timeout: fetchTimeout,
		Env: append(os.Environ(), "APT_CONFIG="+filepath.Join(a.dir, "apt.conf"), "LC_ALL=C.UTF-8"),
	})
}

// Update fetches the package lists.
func (a *Apt) Update(ctx context.Context) error {
	if _, err := a.run(ctx, "apt-get", "--quiet=2", "--error-on=any", "update"); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot fetch Debian's package lists from %s", a.source.Mirror).
			WithHint("check the network, or name another mirror in config.toml, for instance: mirror = \"http://deb.debian.org/debian\"")
	}
	return nil
}

// Package is a package of the archive.
type Package struct {
	Name, Version string
	Architecture  string   // its own; "all" when it fits every one
	Depends       []string // names of the packages it depends on, first alternatives only
	Size          int64    // bytes
}

// Show returns the newest version of a package.
func (a *Apt) Show(ctx context.Context, name string) (Package, error) {
	out, err := a.run(ctx, "apt-cache", "--no-all-versions", "show", name)
	if err != nil {
		return Package{}, fault.Wrap(fault.Precondition, err, "Debian %s has no package %s", a.source.Suite, name)
	}
	return parsePackage(string(out)), nil
}

func parsePackage(paragraph string) Package {
	var p Package
	for line := range strings.Lines(paragraph) {
		field, value, ok := strings.Cut(strings.TrimRight(line, "\n"), ": ")
		if !ok {
			continue
		}
		switch field {
		case "Package":
			p.Name = value
		case "Version":
			p.Version = value
		case "Architecture":
			p.Architecture = value
		case "Size":
			_, _ = fmt.Sscan(value, &p.Size) // zero when it is no number: for display only
		case "Depends":
			for dependency := range strings.SplitSeq(value, ",") {
				first, _, _ := strings.Cut(strings.TrimSpace(dependency), " ")
				p.Depends = append(p.Depends, first)
			}
		}
	}
	return p
}

// Download fetches a package and returns the path of its .deb file. One that is there and has the
// right checksum is not fetched again.
func (a *Apt) Download(ctx context.Context, p Package) (string, error) {
	if _, err := a.run(ctx, "apt-get", "--quiet=2", "download", p.Name+"="+p.Version); err != nil {
		return "", fault.Wrap(fault.Precondition, err, "cannot fetch Debian's package %s", p.Name).
			WithHint("check the network, then try again: what is there already is kept")
	}
	// apt writes an epoch's colon as %3a, as in the archive.
	file := fmt.Sprintf("%s_%s_%s.deb", p.Name, strings.ReplaceAll(p.Version, ":", "%3a"), p.Architecture)
	path := filepath.Join(a.dir, "packages", file)
	if _, err := os.Stat(path); err != nil {
		return "", fault.Wrap(fault.Unexpected, err, "apt fetched no file %s", file)
	}
	return path, nil
}

// Forget removes all fetched packages but the one in the file keep.
func (a *Apt) Forget(keep string) error {
	found, err := filepath.Glob(filepath.Join(a.dir, "packages", "*.deb"))
	if err != nil {
		return err
	}
	for _, path := range found {
		if path == keep {
			continue
		}
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	return nil
}
