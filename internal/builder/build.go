package builder

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"banger/api/agent/v1/agentv1connect"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/image"
	"banger/internal/paths"
	"banger/internal/progress"
	"banger/internal/undo"
	"banger/internal/vm"
)

// The stages of a build, beside those of the VM's creation.
const (
	StageSSH       = "ssh"       // until the VM's server answers
	StageProvision = "provision" // packages, files, modules and steps
	StageScrub     = "scrub"
	StageTest      = "test"
)

const (
	buildTimeout  = 6 * time.Hour
	exportTimeout = time.Hour
	exportRoom    = 1 << 30 // bytes free in the store before the VM boots, beside twice the base
)

// Machines is what the builder needs of the engine.
type Machines interface {
	List(ctx context.Context) ([]vm.VM, error)
	Create(ctx context.Context, spec vm.Spec, start bool, sink progress.Sink) (vm.VM, error)
	Delete(ctx context.Context, ref string, force bool, sink progress.Sink) error
	Agent(ctx context.Context, ref string) (agentv1connect.AgentServiceClient, error)
}

// Images is what it needs of the image store.
type Images interface {
	Get(ctx context.Context, name string) (image.Image, error)
	Free(name string) error
	BootstrapBase(ctx context.Context, o image.BaseOptions, sink progress.Sink) (image.Image, error)
	Build(ctx context.Context, o image.BuildOptions, sink progress.Sink) (image.Image, error)
	Delete(ctx context.Context, name string, used func(name string) error) error
}

// Options are what a builder is made of.
type Options struct {
	Machines Machines
	Images   Images
	// Kernel names the kernel that VMs boot which name none.
	Kernel   func(ctx context.Context) (string, error)
	Paths    paths.Paths
	Defaults vm.Spec // of VMs
	Mirror   string  // of Debian; empty: its own
	Logger   *slog.Logger
	// Warm makes the template of VMs of an image. May be nil.
	Warm func(ctx context.Context, image string, sink progress.Sink)
	Way  Way // how this machine reaches the internet
}

// Builder builds images. Several builds may be under way.
type Builder struct {
	o Options

	mu   sync.Mutex
	busy map[string]bool // the ids of the builds under way
}

// New returns a builder.
func New(o Options) *Builder {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	return &Builder{o: o, busy: map[string]bool{}}
}

// Request says what to build.
type Request struct {
	Recipe     string // a name, or an absolute path
	From       string // an image to build on, instead of what the recipe says; empty: that
	SizeBytes  int64  // what / can grow by meanwhile; 0: what the recipe says
	Name       string // of the image; empty: of the recipe and the content
	KeepFailed bool   // leave the VM when the build fails
}

// Build makes an image of a recipe. When it fails or is cancelled nothing is left but the log, whose path is in the
// error's hint, and with KeepFailed the VM.
func (b *Builder) Build(ctx context.Context, r Request, sink progress.Sink) (image.Image, error) {
	for _, line := range b.Reconcile(ctx) { // what could not be taken back before, for want of room as it may be
		b.o.Logger.Info("builds", "told", line)
	}
	if err := b.o.Images.Free(r.Name); err != nil {
		return image.Image{}, err
	}
	recipes, err := chain(r.Recipe)
	if err != nil {
		return image.Image{}, err
	}
	j, err := b.newJob(r, recipes, sink)
	if err != nil {
		return image.Image{}, err
	}
	defer j.close()
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	made, err := j.run(ctx)
	if err != nil {
		return made, j.explain(ctx, err)
	}
	if b.o.Warm != nil {
		b.o.Warm(ctx, made.Name, sink)
	}
	return made, nil
}

// job is one build at work.
type job struct {
	b       *Builder
	id      string
	what    string // is made or tested, for errors: "recipe dev"
	request Request
	recipes []*Recipe // the one asked for, then those it is built on
	sink    progress.Sink
	log     *buildLog
	seconds []image.StageTime
	skipped []string
	kept    string // the VM that was left to look into
	based   bool   // the base image was made for this build alone
}

func (b *Builder) newJob(r Request, recipes []*Recipe, sink progress.Sink) (*job, error) {
	var random [4]byte
	_, _ = rand.Read(random[:]) // never fails
	id := "build-" + hex.EncodeToString(random[:])
	log, err := newLog(filepath.Join(b.o.Paths.Builds(), recipes[0].Name+"-"+id+logSuffix))
	if err != nil {
		return nil, err
	}
	return &job{b: b, id: id, what: "recipe " + recipes[0].Name, request: r, recipes: recipes, sink: log.follow(sink), log: log}, nil
}

func (j *job) close() {
	if err := j.log.Close(); err != nil {
		j.b.o.Logger.Warn("the log of a build is not whole", "error", err)
	}
}

// explain adds where the log is, and which VM was left.
func (j *job) explain(ctx context.Context, err error) error {
	if fault.KindOf(err) == fault.Interrupted && ctx.Err() != nil && j.kept == "" {
		j.log.note("interrupted")
		return err
	}
	if errors.Is(ctx.Err(), context.DeadlineExceeded) {
		err = fault.Wrap(fault.Timeout, err, "no end within %s", buildTimeout)
	}
	hint := fault.HintOf(err)
	if hint != "" {
		hint += "; "
	}
	hint += "the log of the build is " + j.log.path
	if j.kept != "" {
		hint += fmt.Sprintf("; look into it with: banger vm ssh %s, and remove it with: banger vm delete --force %s", j.kept, j.kept)
		if j.based {
			hint += " && banger image delete " + baseOf(j.id)
		}
	}
	j.log.note("failed: " + err.Error())
	return fault.Wrap(fault.KindOf(err), err, "%s", j.what).WithHint("%s", hint)
}

// stage runs one part and notes how long it took.
func (j *job) stage(name string, f func() error) error {
	begin := time.Now()
	err := j.sink.Run(name, f)
	j.seconds = append(j.seconds, image.StageTime{Stage: name, Seconds: time.Since(begin).Seconds()})
	return err
}

// run goes through all stages. The record names what is made before it is made, so that a daemon that starts after
// a crash can take it back.
func (j *job) run(ctx context.Context) (made image.Image, err error) {
	forget, err := j.b.record(j.id)
	if err != nil {
		return made, err
	}
	u := undo.New()
	defer func() { err = j.takeBack(ctx, u, forget, err) }()
	base, err := j.base(ctx, u)
	if err != nil {
		return made, err
	}
	v, kernel, err := j.boot(ctx, base, u)
	if err != nil {
		return made, err
	}
	made, err = j.inVM(ctx, v, base, kernel)
	if err != nil && j.request.KeepFailed && ctx.Err() == nil {
		u.Keep()
		return made, j.keep(v.Spec.Name, err)
	}
	return made, err
}

// takeBack removes what the build made, whatever became of ctx. The record stays while anything does: the next daemon
// tries again.
func (j *job) takeBack(ctx context.Context, u *undo.Stack, forget func() error, err error) error {
	defer j.b.over(j.id)
	var left error
	u.Unwind(ctx, &left)
	if left == nil && j.kept == "" {
		left = forget()
	}
	return errors.Join(err, left)
}

// keep leaves the VM to look into. With it stays a base image that was made for it: the record says that it can go when
// the VM is gone.
func (j *job) keep(name string, err error) error {
	j.kept = name
	return errors.Join(err, j.b.markKept(j.id))
}

// baseOf names the image that is bootstrapped for a build.
func baseOf(id string) string { return id + "-base" }

// base returns the image that the temporary VM boots from: one that is there, or a Debian bootstrapped with the
// recipe's packages.
func (j *job) base(ctx context.Context, u *undo.Stack) (base image.Image, err error) {
	last := j.recipes[len(j.recipes)-1]
	kind, rest := last.base()
	if j.request.From != "" {
		kind, rest = fromImage, j.request.From
	}
	if kind == fromImage {
		err := j.stage("base", func() (err error) { base, err = j.present(ctx, rest); return err })
		return base, err
	}
	name := baseOf(j.id)
	j.based = true
	u.Push("base image", func(ctx context.Context) error { return j.b.removeBase(ctx, j.id) })
	err = j.stage(image.Stage, func() (err error) {
		base, err = j.b.o.Images.BootstrapBase(ctx, image.BaseOptions{
			Name: name, Mirror: j.b.o.Mirror, Suite: rest, Packages: j.packages(), Log: j.log.note,
		}, j.sink)
		return err
	})
	return base, err
}

// present finds an image that is there, and refuses another one than the recipe was written for.
func (j *job) present(ctx context.Context, ref string) (image.Image, error) {
	name, digest := cutDigest(ref)
	base, err := j.b.o.Images.Get(ctx, name)
	if err == nil && digest != "" && base.Digest != digest {
		err = fault.New(fault.Conflict, "the base image %s is not the one that the recipe names: it has %s, not %s", base.Name, base.Digest, digest).
			WithHint("bring back that image, or change the digest behind from in the recipe")
	}
	return base, err
}

func (j *job) packages() []string {
	var all []string
	for _, r := range j.recipes {
		all = append(all, r.Packages...)
	}
	return all
}

// boot brings the temporary VM up.
func (j *job) boot(ctx context.Context, base image.Image, u *undo.Stack) (v vm.VM, kernel string, err error) {
	spec := j.b.o.Defaults
	spec.Name, spec.Image, spec.NAT, spec.Cold, spec.Ephemeral = j.id, base.Name, true, true, !j.request.KeepFailed
	spec.AuthorizedKeys = nil
	spec.MemoryBytes = max(spec.MemoryBytes, j.largest(func(r *Recipe) string { return r.Memory }))
	if spec.DiskBytes = j.largest(func(r *Recipe) string { return r.Size }); j.request.SizeBytes != 0 {
		spec.DiskBytes = j.request.SizeBytes
	}
	spec.WorkDiskBytes = max(spec.WorkDiskBytes, base.WorkSeedBytes)
	if spec.Kernel, err = j.b.o.Kernel(ctx); err != nil {
		return v, "", err
	}
	if err := j.room(base); err != nil {
		return v, "", err
	}
	u.Push("temporary VM", func(ctx context.Context) error { return j.b.removeVM(ctx, j.id) })
	err = j.stage("boot", func() (err error) {
		v, err = j.b.o.Machines.Create(ctx, spec, true, j.log.quiet())
		return err
	})
	return v, spec.Kernel, err
}

// room refuses to begin what would fail at its end: the overlay and the new image each hold what is added, and the new
// image the base as well.
func (j *job) room(base image.Image) error {
	if base.Root == "" {
		return nil
	}
	size, err := disk.AllocatedBytes(base.Root)
	if err != nil {
		return err
	}
	return disk.RequireFree(j.b.o.Paths.State, size+exportRoom, "the build of an image")
}

func (j *job) largest(of func(*Recipe) string) (size int64) {
	for _, r := range j.recipes {
		if n, err := vm.ParseSize(of(r)); err == nil { // checked when it was loaded
			size = max(size, n)
		}
	}
	return size
}

func (b *Builder) removeVM(ctx context.Context, name string) error {
	err := b.o.Machines.Delete(ctx, name, true, nil)
	if fault.KindOf(err) == fault.NotFound {
		return nil
	}
	return err
}

// inVM does what needs a running system, and makes the image of the result.
func (j *job) inVM(ctx context.Context, v vm.VM, base image.Image, kernel string) (made image.Image, err error) {
	ctx, stop := j.watch(ctx)
	defer func() { err = stop(err) }()
	g, err := j.connect(ctx, v)
	if err != nil {
		return made, err
	}
	defer func() { _ = g.Close() }()
	if err := j.stage(StageProvision, func() error { return j.provision(ctx, g, base) }); err != nil {
		return made, err
	}
	if err := j.stage(StageScrub, func() error { return j.scrub(ctx, g) }); err != nil {
		return made, err
	}
	err = j.stage(image.StageExport, func() (err error) {
		made, err = j.export(ctx, g, base, kernel)
		return err
	})
	return made, err
}

func (j *job) connect(ctx context.Context, v vm.VM) (g *guest, err error) {
	err = j.stage(StageSSH, func() error {
		g, err = j.b.connect(ctx, v, j.log)
		return err
	})
	return g, err
}

// export streams the root file system into a new image.
func (j *job) export(ctx context.Context, g *guest, base image.Image, kernel string) (image.Image, error) {
	ctx, cancel := context.WithTimeout(ctx, exportTimeout)
	defer cancel()
	size, err := treeSize(ctx, g)
	if err != nil {
		return image.Image{}, err
	}
	r := j.recipes[0]
	begin := time.Now()
	parent := base.Name
	if kind, _ := j.recipes[len(j.recipes)-1].base(); kind == fromDebian && j.request.From == "" {
		parent = "" // nothing that outlives the build
	}
	return j.b.o.Images.Build(ctx, image.BuildOptions{
		Name: j.request.Name, Alias: r.Name, Description: r.Description, RecipeHash: j.hash(), Parent: base, Room: size,
		Export: func(ctx context.Context, w io.Writer) error {
			return j.b.exportTree(ctx, g, &meter{w: w, told: func(n int64) {
				j.sink.Update(image.StageExport, "taking the file system out of the VM", 0.9*min(1, float64(n)/float64(max(size, 1))))
			}})
		},
		Finish: func(m *image.Manifest) {
			m.Build = &image.Built{
				Recipe: r.Origin, From: j.request.From, Parent: parent, ParentDigest: base.Digest, Kernel: kernel, ListHash: r.ListHash,
				Seconds:    append(j.seconds, image.StageTime{Stage: image.StageExport, Seconds: time.Since(begin).Seconds()}),
				Definition: testsOfAll(j.recipes), Incomplete: j.skipped,
			}
		},
	}, j.sink)
}

// hash is over the recipe and those it is built on.
func (j *job) hash() string { return hashOf(j.recipes) }

func hashOf(recipes []*Recipe) string {
	if len(recipes) == 1 {
		return recipes[0].Hash
	}
	text := ""
	for _, r := range recipes {
		text += r.Hash + "\n"
	}
	return hash(text)
}
