package image

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strings"
	"time"

	"banger/internal/artifact"
	"banger/internal/debian"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/progress"
	"banger/internal/system"
)

// Stage is the name of the stage that Bootstrap reports.
const Stage = "image"

// SeedBytes is the size of a work seed: the default size of a work disk, which then needs no growing.
const SeedBytes = 4 << 30

const (
	bootstrapTimeout = 30 * time.Minute
	imageSpace       = 300 << 20 // bytes free in the store before it begins
	scratchSpace     = 600 << 20 // the same for mmdebstrap's temporary files
)

// packages are what is in the default image beside Debian's required ones: enough to log in, look
// around and install the rest.
var packages = []string{
	"systemd", "systemd-sysv", "dbus", "udev", "kmod", "openssh-server", "iproute2", "iputils-ping", "netbase",
	"ca-certificates", "sudo", "less", "procps", "curl", "vim-tiny", "bash-completion",
}

// BootstrapOptions says which release of Debian the image is made of; it is for this machine's architecture.
type BootstrapOptions struct {
	Mirror  string // URL; empty: Debian's own
	Suite   string // release; empty: stable
	Rebuild bool   // also when the default image is there already
}

// Bootstrap makes an image of a Debian release with mmdebstrap, and makes it the default. With a
// sound default image in place it returns that one at once, unless told to rebuild; an image that was made
// before is never changed. Without root rights mmdebstrap works in a user namespace.
func (s *Store) Bootstrap(ctx context.Context, o BootstrapOptions, sink progress.Sink) (i Image, err error) {
	if i, err := s.Get(ctx, ""); err == nil && !o.Rebuild {
		return i, nil
	}
	err = sink.Run(Stage, func() error {
		i, err = s.bootstrap(ctx, o, sink)
		return err
	})
	return i, err
}

func (s *Store) bootstrap(ctx context.Context, o BootstrapOptions, sink progress.Sink) (Image, error) {
	source := debian.Source{Mirror: o.Mirror, Suite: o.Suite}.WithDefaults(runtime.GOARCH)
	name, err := s.makeBootstrapped(ctx, bootstrapPlan{Source: source, packages: packages}, func(*Manifest) {}, sink)
	if err != nil {
		return Image{}, err
	}
	if err := s.shelf.SetDefault(name); err != nil {
		return Image{}, err
	}
	return s.Get(ctx, name)
}

// bootstrapPlan is a release of Debian with the packages to put in.
type bootstrapPlan struct {
	debian.Source
	packages []string
	log      func(line string) // is given each line that mmdebstrap says; may be nil
}

// makeBootstrapped makes an image of a plan; change has the last word on its manifest.
func (s *Store) makeBootstrapped(ctx context.Context, plan bootstrapPlan, change func(*Manifest), sink progress.Sink) (name string, err error) {
	defer elbowRoom()()
	if err := plan.Check(); err != nil {
		return "", err
	}
	mmdebstrap, err := findTools()
	if err != nil {
		return "", err
	}
	return s.shelf.Build(func(dir string) (string, any, error) {
		if err := errors.Join(disk.RequireFree(filepath.Dir(dir), imageSpace, "an image"), disk.RequireFree(os.TempDir(), scratchSpace, "the making of an image")); err != nil {
			return "", nil, err
		}
		m, err := makeImage(ctx, dir, mmdebstrap, plan, sink)
		change(&m)
		return m.Name, m, err
	})
}

// findTools finds all programs before any work is done.
func findTools() (mmdebstrap string, err error) {
	if mmdebstrap, err = system.Find("mmdebstrap", "mmdebstrap"); err != nil {
		return "", err
	}
	for _, tool := range []string{"mke2fs", "debugfs"} {
		if _, err := system.Find(tool, "e2fsprogs"); err != nil {
			return "", err
		}
	}
	if os.Geteuid() != 0 {
		if _, err := system.Find("newuidmap", "uidmap"); err != nil {
			return "", err
		}
	}
	return mmdebstrap, nil
}

func makeImage(ctx context.Context, dir, mmdebstrap string, source bootstrapPlan, sink progress.Sink) (Manifest, error) {
	m := Manifest{
		Aliases: []string{"debian", "debian-" + source.Suite}, Description: "Debian " + source.Suite + " for development",
		Architecture: source.Architecture, Suite: source.Suite, Recipe: recipe(source), CreatedAt: time.Now().UTC(),
	}
	result, err := writeRoot(ctx, filepath.Join(dir, rootName), mmdebstrap, source, sink)
	if err != nil {
		return m, err
	}
	sink.Update(Stage, "making the work seed", 0.97)
	skipped, err := disk.CreateExt4FromTar(ctx, filepath.Join(dir, seedName), SeedBytes, "work", &result.home)
	if err != nil {
		return m, err
	}
	m.Skipped = append(result.skipped.Lines(), skipped...)
	m.Packages = result.packages
	m.PackagesHash = hash(strings.Join(m.Packages, "\n"))
	if m.Files, err = artifact.Describe(dir, rootName, seedName); err != nil {
		return m, err
	}
	m.Digest = artifact.Digest(m.Files)
	m.Name = "debian-" + source.Suite + "-" + strings.TrimPrefix(m.Digest, "sha256:")[:8]
	return m, nil
}

func recipe(source bootstrapPlan) string {
	b, err := json.Marshal([]any{filterFormat, source.Suite, source.Architecture, source.packages, dropped, added, neededDirs})
	if err != nil {
		panic("image: the recipe is not JSON: " + err.Error()) // strings and numbers only
	}
	return hash(string(b))
}

func hash(s string) string {
	sum := sha256.Sum256([]byte(s))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// writeRoot lets the root file system flow from mmdebstrap through the filter into an ext4, with no
// copy in between.
func writeRoot(ctx context.Context, out, mmdebstrap string, source bootstrapPlan, sink progress.Sink) (result *filtered, err error) {
	f, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	raw, rawIn := io.Pipe()
	kept, keptIn := io.Pipe()
	filterDone, writeDone := make(chan error, 1), make(chan error, 1)
	go func() {
		r, err := filterRoot(ctx, keptIn, raw)
		result = r
		_ = keptIn.CloseWithError(err) // nil is end of file; these closes never fail
		_ = raw.CloseWithError(err)
		filterDone <- err
	}()
	go func() {
		err := disk.WriteExt4(ctx, kept, f)
		_ = kept.CloseWithError(err)
		writeDone <- err
	}()
	runErr := runBootstrap(ctx, mmdebstrap, source, rawIn, sink)
	_ = rawIn.CloseWithError(runErr)
	filterErr, writeErr := <-filterDone, <-writeDone
	return result, firstCause(ctx, writeErr, filterErr, runErr)
}

// leftBehind is a failure to clean up, which people must hear of whatever else happened.
type leftBehind struct{ error }

func (l *leftBehind) Unwrap() error { return l.error }

// firstCause picks the error of a pipeline that the others follow from: the one nearest to the
// end, unless it only repeats what came down the pipe.
func firstCause(ctx context.Context, writeErr, filterErr, runErr error) error {
	var left *leftBehind
	switch {
	case errors.As(runErr, &left):
		return runErr
	case ctx.Err() != nil:
		return ctx.Err()
	case writeErr != nil && errors.Is(filterErr, writeErr): // which names a file that is not to blame
		return writeErr
	case filterErr != nil && runErr != nil && errors.Is(filterErr, runErr):
		return runErr
	case writeErr != nil && (filterErr == nil || !errors.Is(writeErr, filterErr)):
		return writeErr
	case filterErr != nil:
		return filterErr
	}
	return runErr
}

func runBootstrap(ctx context.Context, mmdebstrap string, source bootstrapPlan, out io.Writer, sink progress.Sink) error {
	options, err := debian.HostOptions(ctx)
	if err != nil {
		return err
	}
	keyring, err := debian.Keyring()
	if err != nil {
		return err
	}
	scratch, err := newScratch(ctx, mmdebstrap)
	if err != nil {
		return err
	}
	args := []string{
		"--format=tar", "--variant=minbase", "--architectures=" + source.Architecture, "--include=" + strings.Join(source.packages, ","),
		`--aptopt=Apt::Install-Recommends "false";`, "--dpkgopt=force-unsafe-io",
	}
	for _, o := range options {
		args = append(args, "--aptopt="+o)
	}
	args = append(append(args, source.Suite, "-"), source.Lines(keyring)...)
	program, args, err := ownMounts(mmdebstrap, args)
	if err != nil {
		return errors.Join(err, scratch.remove(ctx))
	}
	_, err = system.Run(ctx, system.Command{
		Path: program, Args: args, Stdout: out, OnStderrLine: bootstrapProgress(sink, source.log), Timeout: bootstrapTimeout,
		Env: append(os.Environ(), "TMPDIR="+scratch.dir, "LC_ALL=C.UTF-8", "DEBIAN_FRONTEND=noninteractive"),
	})
	if removeErr := scratch.remove(ctx); removeErr != nil {
		return errors.Join(err, &leftBehind{removeErr})
	}
	if err != nil && ctx.Err() == nil {
		return fault.Wrap(fault.Precondition, err, "cannot bootstrap Debian %s", source.Suite).
			WithHint("%s", bootstrapHint())
	}
	return err
}

// ownMounts has root's mmdebstrap mount what it mounts in a namespace of its own: when it is killed, the
// mounts go with it, and nothing of the host lies below the directory that is removed then. So do its
// children, apt and dpkg, by a namespace of processes. Another user's mmdebstrap makes such namespaces itself.
func ownMounts(mmdebstrap string, args []string) (program string, all []string, err error) {
	if os.Geteuid() != 0 {
		return mmdebstrap, args, nil
	}
	unshare, err := system.Find("unshare", "util-linux")
	own := []string{"--mount", "--propagation", propagation(), "--pid", "--fork", "--kill-child", "--mount-proc", "--", mmdebstrap}
	return unshare, append(own, args...), err
}

// propagation keeps mounts to the namespace. In a plain chroot that cannot be asked for: the root is no
// mount there.
func propagation() string {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err == nil && !rootMount.Match(mounts) {
		return "unchanged"
	}
	return "private"
}

// rootMount matches the line of a mount at "/" (proc_pid_mountinfo(5): the fifth field).
var rootMount = regexp.MustCompile(`(?m)^(\S+ ){4}/ `)

func bootstrapHint() string {
	if os.Geteuid() == 0 {
		return "check the network, then run: banger setup"
	}
	return "check the network, that /etc/subuid and /etc/subgid have a line for you, and that user namespaces are allowed; then run: banger setup"
}

// milestones are what mmdebstrap says on the way, and how much of the time has passed then.
var milestones = []struct {
	words    string
	message  string
	fraction float64
}{
	{"running apt-get update", "reading Debian's package lists", 0.01},
	{"downloading packages with apt", "fetching packages", 0.1},
	{"extracting archives", "unpacking the base system", 0.25},
	{"installing essential packages", "installing the base system", 0.35},
	{"installing remaining packages", "installing packages", 0.5},
	{"cleaning package lists", "cleaning up", 0.9},
	{"creating tarball", "writing the file system", 0.92},
}

func bootstrapProgress(sink progress.Sink, log func(line string)) func(line string) {
	return func(line string) {
		if log != nil {
			log(line)
		}
		for _, m := range milestones {
			if strings.Contains(line, m.words) {
				sink.Update(Stage, m.message, m.fraction)
				return
			}
		}
	}
}
