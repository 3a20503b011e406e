package image

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"banger/internal/artifact"
	"banger/internal/debian"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/progress"
)

// StageExport is the name of the stage that Build reports.
const StageExport = "export"

// Built is what a manifest tells of an image that was built from a recipe.
type Built struct {
	Recipe       string          `json:"recipe"`               // its name, or the directory it lies in
	Parent       string          `json:"parent,omitempty"`     // name of the image that the temporary VM booted from
	From         string          `json:"from,omitempty"`       // the image that was asked for instead of what the recipe says
	ParentDigest string          `json:"parent_digest"`        // of that image
	Kernel       string          `json:"kernel"`               // that the VM booted
	ListHash     string          `json:"package_list_hash"`    // of the packages that the recipe asks for
	Seconds      []StageTime     `json:"seconds"`              // how long each stage took
	Definition   json.RawMessage `json:"definition"`           // the tests of the recipe, as package builder knows them
	Incomplete   []string        `json:"incomplete,omitempty"` // steps that were left out, a line each
}

// StageTime is how long a stage of a build took.
type StageTime struct {
	Stage   string  `json:"stage"`
	Seconds float64 `json:"seconds"`
}

// BaseOptions say which Debian to bootstrap for a build.
type BaseOptions struct {
	Name     string
	Mirror   string   // URL; empty: Debian's own
	Suite    string   // release; empty: stable
	Packages []string // beside those of the default image
	// Log is given each line that mmdebstrap says. May be nil.
	Log func(line string)
}

// BootstrapBase makes an image of a Debian release with further packages in it, at the host's speed. It becomes
// neither the default nor known by an alias.
func (s *Store) BootstrapBase(ctx context.Context, o BaseOptions, sink progress.Sink) (Image, error) {
	if err := s.Free(o.Name); err != nil {
		return Image{}, err
	}
	source := debian.Source{Mirror: o.Mirror, Suite: o.Suite}.WithDefaults(runtime.GOARCH)
	plan := bootstrapPlan{Source: source, packages: append(append([]string{}, packages...), o.Packages...), log: o.Log}
	made, err := s.makeBootstrapped(ctx, plan, func(m *Manifest) { m.Name, m.Aliases = o.Name, nil }, sink)
	if err != nil {
		return Image{}, noRoom(err, s.shelf.Dir(""))
	}
	return s.Get(ctx, made)
}

// BasePackages are what is in the default image beside Debian's required packages.
func BasePackages() []string { return append([]string{}, packages...) }

// Free is nil while no image has the name; "" stands for a name that is made up later.
func (s *Store) Free(name string) error {
	if name == "" {
		return nil
	}
	if err := checkName(name); err != nil {
		return err
	}
	if s.shelf.Has(name) {
		return fault.New(fault.Conflict, "there is an image %q already", name).
			WithHint("choose another name, or delete that one: banger image delete %s", name)
	}
	return nil
}

// BuildOptions say what Build makes an image of.
type BuildOptions struct {
	Name        string // empty: the alias and a part of the digest
	Alias       string // means the newest image having it
	Description string
	RecipeHash  string
	Parent      Image
	// Room is how many bytes the tar stream may come to; it has to be free twice.
	Room int64
	// Export writes the root file system as a tar stream, with the content of /root below "root/".
	Export func(ctx context.Context, w io.Writer) error
	// Finish fills in what is known only when the image is written. May be nil.
	Finish func(m *Manifest)
}

// Build makes an image of the root file system of a machine that was made ready. What belongs to that machine alone
// does not go into it.
func (s *Store) Build(ctx context.Context, o BuildOptions, sink progress.Sink) (i Image, err error) {
	defer elbowRoom()()
	if err := s.Free(o.Name); err != nil {
		return i, err
	}
	name, err := s.shelf.Build(func(dir string) (string, any, error) {
		if err := disk.RequireFree(dir, o.Room+importSpace, "the image"); err != nil {
			return "", nil, err
		}
		m, err := o.write(ctx, dir, sink)
		if err == nil {
			err = s.Free(o.Name) // nobody took it since we looked
		}
		return m.Name, m, err
	})
	if err != nil {
		return Image{}, noRoom(err, s.shelf.Dir(""))
	}
	return s.Get(ctx, name)
}

func (o BuildOptions) write(ctx context.Context, dir string, sink progress.Sink) (Manifest, error) {
	m := Manifest{
		Description: o.Description, Architecture: runtime.GOARCH, Suite: o.Parent.Manifest.Suite, Recipe: o.RecipeHash,
		MaskedUnits: o.Parent.MaskedUnits, CreatedAt: time.Now().UTC(),
	}
	if o.Alias != "" {
		m.Aliases = []string{o.Alias}
	}
	home := filepath.Join(dir, homeName)
	result, err := writeTree(ctx, filepath.Join(dir, rootName), home, exportRules(m.Suite != ""), func(w io.Writer) error {
		return o.Export(ctx, w)
	})
	if err != nil {
		return m, err
	}
	m.Packages, m.PackagesHash = result.packages, hash(strings.Join(result.packages, "\n"))
	sink.Update(StageExport, "making the work seed", 0.9)
	skipped, err := writeSeedFrom(ctx, home, filepath.Join(dir, seedName))
	if err != nil {
		return m, err
	}
	m.Skipped = append(result.skipped.Lines(), skipped...)
	if err := os.Remove(home); err != nil {
		return m, err
	}
	if m.Files, err = artifact.Describe(dir, rootName, seedName); err != nil {
		return m, err
	}
	m.Digest = artifact.Digest(m.Files)
	if m.Name = o.Name; m.Name == "" {
		m.Name = o.Alias + "-" + strings.TrimPrefix(m.Digest, "sha256:")[:8]
	}
	if o.Finish != nil {
		o.Finish(&m)
	}
	return m, nil
}

// writeTree lets a root file system flow through the filter into an ext4, with no copy in between; what is in
// /root goes into the tar file home.
func writeTree(ctx context.Context, out, home string, r rules, produce func(io.Writer) error) (result *filtered, err error) {
	file, err := os.OpenFile(out, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	apart, err := os.OpenFile(home, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, apart.Close()) }()
	result = &filtered{}
	return result, pipeline(ctx, produce,
		func(w io.Writer, in io.Reader) error {
			f := newFilter(r, w, apart, result)
			if err := f.run(ctx, in); err != nil {
				return err
			}
			return f.finish()
		},
		func(in io.Reader) error { return disk.WriteExt4(ctx, in, file) },
	)
}

// writeSeedFrom makes a work seed of a tar file: with room for twice the content, in whole GiB.
func writeSeedFrom(ctx context.Context, home, seed string) (skipped []string, err error) {
	f, err := os.Open(home)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	info, err := f.Stat()
	if err != nil {
		return nil, err
	}
	size := max(SeedBytes, (2*info.Size()+1<<30-1)>>30<<30)
	return disk.CreateExt4FromTar(ctx, seed, size, "work", f)
}

// ownTraces are the paths that tell one machine from another, and what it can make again: they do not go
// into an image. They are written as in dropped.
var ownTraces = []string{
	"etc/machine-id", "etc/resolv.conf", "etc/hostname", "etc/ssh/sshd_config.d/00-banger.conf",
	"run/", "tmp/", "var/tmp/", "var/log/*", "var/cache/apt/*", "var/cache/apk/*", "var/cache/ldconfig/*", "var/lib/apt/lists/*",
	"var/lib/systemd/random-seed", "var/lib/systemd/timers/", "var/lib/dhcp/*", "var/lib/dbus/machine-id",
	// Each VM has these on its overlay disk's own ext4, and only while they are empty in the image.
	"var/lib/docker/", "var/lib/containerd/",
}

// exportRules leave out what belongs to the machine that was made ready. An image of Debian is without the
// documentation as well, like the base that it began with.
func exportRules(isDebian bool) rules {
	r := rules{raw: true, added: map[string]string{}, needed: neededDirs, maxHome: maxImportedHome}
	for _, name := range []string{"etc/machine-id", "etc/resolv.conf", "etc/hostname"} {
		r.added[name] = added[name]
	}
	r.dropped = func(name string, dir bool) bool {
		switch {
		case matches(ownTraces, name, dir) || strings.HasPrefix(name, "etc/ssh/ssh_host_"):
			return true
		case name == "etc/fstab" || name == "etc/default/locale": // the recipe's own by now
			return false
		}
		return isDebian && isDropped(name, dir)
	}
	return r
}
