package cli

import (
	"cmp"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/bundle"
	"banger/internal/fault"
	"banger/internal/progress"
	"banger/internal/supply"
)

type runtimeView struct {
	Directory    string              `json:"directory"`
	Origin       string              `json:"origin"`
	Version      string              `json:"version"`
	Architecture string              `json:"architecture"`
	Manifest     bool                `json:"manifest"`
	Parts        []runtimePartView   `json:"parts"`
	Sources      []runtimeSourceView `json:"sources"`
	Listing      string              `json:"listing"`
	Problem      string              `json:"problem"`
	Drivers      []driverView        `json:"drivers"`
}

type runtimePartView struct {
	Name      string `json:"name"`
	Path      string `json:"path"`
	Present   bool   `json:"present"`
	SizeBytes int64  `json:"size_bytes"`
	Version   string `json:"version"`
}

type runtimeSourceView struct {
	Part     string `json:"part"`
	Version  string `json:"version"`
	URL      string `json:"url"`
	SHA256   string `json:"sha256"`
	Manifest string `json:"manifest"`
}

func viewRuntime(p bundle.Place, b bundle.Bundle) runtimeView {
	v := runtimeView{
		Directory: p.Dir, Origin: string(p.Origin), Version: b.Manifest.Version, Architecture: b.Manifest.Architecture,
		Manifest: !b.Bare, Parts: []runtimePartView{}, Sources: []runtimeSourceView{}, Drivers: []driverView{},
	}
	for _, part := range b.Parts() {
		one := runtimePartView{Name: part.Name, Path: part.Path}
		if info, err := os.Stat(part.Path); err == nil {
			one.Present, one.SizeBytes = true, info.Size()
		}
		if source, ok := b.SourceOf(part.Path); ok {
			one.Version = source.Version
		}
		v.Parts = append(v.Parts, one)
	}
	for _, s := range b.Manifest.Sources {
		v.Sources = append(v.Sources, runtimeSourceView{Part: s.Part, Version: s.Version, URL: s.URL, SHA256: s.SHA256, Manifest: s.Manifest})
	}
	return v
}

func newRuntimeCommand(e *Env) *cobra.Command {
	cmd := group(
		"runtime", "The runtime directory: Firecracker, and kernels and images made elsewhere",
		newRuntimeStatusCommand(e), newRuntimeFetchCommand(e), newRuntimeVerifyCommand(e), newRuntimePackageCommand(e), newRuntimeInstallCommand(e),
	)
	cmd.Long = "The runtime directory holds what banger needs and does not build itself. It is ./runtime in a source checkout and\n" +
		"../lib/banger beside an installed program; " + bundle.DirVariable + " names another one.\n\n" +
		"Nobody publishes bundles for you: " + strings.Replace(supply.Local, "; ", ";\n", 1) + ".\n" +
		"To keep a manifest of your own for good, put it into the directory of config.toml. Firecracker comes from its own\n" +
		"releases: banger runtime install firecracker."
	return cmd
}

// changeRuntime runs f with the runtime directory as something to change, whose stages are shown.
func (e *Env) changeRuntime(ctx context.Context, limit time.Duration, f func(context.Context, bundle.Place, *supply.Store) error) error {
	return e.within(ctx, limit, func(ctx context.Context) error {
		place, err := bundle.Here()
		if err != nil {
			return err
		}
		d := e.newDisplay()
		defer d.close()
		return f(ctx, place, &supply.Store{Dir: place.Dir, Downloads: e.Paths.Downloads(), Sink: d.local()})
	})
}

var progressStatuses = map[progress.Status]bangerv1.Progress_Status{
	progress.Started: bangerv1.Progress_STATUS_STARTED, progress.Update: bangerv1.Progress_STATUS_UPDATE,
	progress.Done: bangerv1.Progress_STATUS_DONE, progress.Failed: bangerv1.Progress_STATUS_FAILED,
	progress.Notice: bangerv1.Progress_STATUS_NOTICE,
}

// local returns the receiver for what this process does itself.
func (d *display) local() progress.Sink {
	sink := d.sink("")
	return func(event progress.Event) {
		p := &bangerv1.Progress{
			Stage: event.Stage, Message: event.Message, Status: progressStatuses[event.Status], DurationNanos: int64(event.Duration),
		}
		if event.Fraction >= 0 {
			p.Fraction = &event.Fraction
		}
		sink(p)
	}
}

func newRuntimeStatusCommand(e *Env) *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use: "status", Short: "Tell where the runtime directory is and what it has",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runRuntimeStatus(cmd.Context(), output, e) },
	}
	addOutputFlag(cmd, &output)
	return cmd
}

func runRuntimeStatus(ctx context.Context, output outputFormat, e *Env) error {
	place, err := bundle.Here()
	if err != nil {
		return err
	}
	b, err := bundle.Read(place.Dir)
	v := viewRuntime(place, b)
	if err != nil {
		v.Problem = problemText(err)
	}
	for _, p := range v.Parts {
		if !p.Present && v.Problem == "" {
			v.Problem = p.Path + " is missing; see what else is wrong: banger runtime verify"
		}
	}
	from, err := supply.Choose(e.listings(place)...)
	switch {
	case err == nil:
		v.Listing = from.Listing
	case v.Problem == "" && fault.KindOf(err) != fault.NotFound:
		v.Problem = problemText(err)
	}
	// Only the daemon knows which of them can run VMs here; the question does not start one.
	if status, err := e.daemonStatus(ctx); err == nil && status != nil {
		v.Drivers = slices.DeleteFunc(viewDaemon(status, "").Drivers, func(d driverView) bool { return !b.HasVMM(d.Name) })
	}
	return e.print(output, v, func() string { return e.describeRuntime(v) })
}

func problemText(err error) string {
	text := err.Error()
	if hint := fault.HintOf(err); hint != "" {
		text += "; " + hint
	}
	return text
}

// listings are the manifests that fetch looks into, the user's own first.
func (e *Env) listings(place bundle.Place) []string {
	return []string{e.Paths.BundleListing(), place.Source}
}

func (e *Env) describeRuntime(v runtimeView) string {
	listing := v.Listing
	if listing == "" {
		listing = "no bundle is listed; " + supply.Local
	}
	all := []field{
		{"directory", v.Directory},
		{"chosen by", map[string]string{
			string(bundle.FromEnvironment): bundle.DirVariable, string(bundle.FromCheckout): "the source checkout",
			string(bundle.FromInstall): "the installation",
		}[v.Origin]},
		{"problem", v.Problem},
		{"version", v.Version},
		{"architecture", v.Architecture},
		{"fetch from", listing},
	}
	for _, d := range v.Drivers {
		all = append(all, field{d.Name, describeDriver(d)})
	}
	text := fields(all)
	if len(v.Parts) == 0 {
		return text + "\nNothing is in it. VMs run without: on the QEMU of this machine, with what banger setup makes.\n"
	}
	rows := make([][]string, len(v.Parts))
	for i, p := range v.Parts {
		rows[i] = []string{p.Name, cmp.Or(p.Version, "-"), "missing", p.Path}
		if p.Present {
			rows[i][2] = size(p.SizeBytes)
		}
	}
	return text + "\n" + e.table([]column{{title: "PART"}, {title: "VERSION"}, {title: "SIZE", right: true}, {title: "PATH"}}, rows)
}

type runtimeFetchOptions struct {
	manifest string
	output   outputFormat
}

func newRuntimeFetchCommand(e *Env) *cobra.Command {
	var o runtimeFetchOptions
	cmd := &cobra.Command{
		Use: "fetch", Short: "Put the bundle that a manifest lists into the runtime directory",
		Long: "Put the bundle for this machine that a manifest lists into the runtime directory: first your own,\n" +
			bundle.SourceFile + " in the directory of config.toml, then the one that came with banger, which lists none.\n" +
			"So, to begin, " + strings.Replace(supply.Local, "; ", ";\n", 1) + ".",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runRuntimeFetch(cmd.Context(), o, e) },
	}
	cmd.Flags().StringVar(&o.manifest, "manifest", "", "manifest that lists the bundle")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runRuntimeFetch(ctx context.Context, o runtimeFetchOptions, e *Env) error {
	return e.changeRuntime(ctx, setupLimit, func(ctx context.Context, place bundle.Place, store *supply.Store) error {
		listings := e.listings(place)
		if o.manifest != "" {
			listings = []string{o.manifest}
		}
		from, err := supply.Choose(listings...)
		if err != nil {
			return err
		}
		b, again, err := store.Fetch(ctx, from)
		if err != nil {
			return err
		}
		v := viewRuntime(place, b)
		return e.print(o.output, v, func() string {
			if again {
				return "the bundle is in place already: " + place.Dir + "\n"
			}
			return fmt.Sprintf("the bundle is in place: %d parts in %s\n", len(v.Parts), place.Dir)
		})
	})
}

type runtimeVerifyView struct {
	Directory string   `json:"directory"`
	Files     int      `json:"files"`
	Problems  []string `json:"problems"`
}

func newRuntimeVerifyCommand(e *Env) *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use: "verify", Short: "Compare the runtime directory with its checksums; exit code 5 when something is wrong",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runRuntimeVerify(cmd.Context(), output, e) },
	}
	addOutputFlag(cmd, &output)
	return cmd
}

func runRuntimeVerify(ctx context.Context, output outputFormat, e *Env) error {
	return e.within(ctx, saveLimit, func(ctx context.Context) error {
		place, err := bundle.Here()
		if err != nil {
			return err
		}
		b, err := bundle.Read(place.Dir)
		if err != nil {
			return err
		}
		problems, err := supply.Verify(ctx, b)
		if err != nil {
			return err
		}
		v := runtimeVerifyView{Directory: place.Dir, Files: len(b.Manifest.Files), Problems: []string{}}
		for _, p := range problems {
			v.Problems = append(v.Problems, p.Text)
		}
		err = e.print(output, v, func() string { return describeVerified(v) })
		if err != nil || len(problems) == 0 {
			return err
		}
		return fault.New(fault.Precondition, "the runtime directory %s is damaged", place.Dir).
			WithHint("%s", mending(place.Dir, problems))
	})
}

// mending names the commands that mend what is wrong, each once.
func mending(dir string, problems []supply.Problem) string {
	var commands []string
	for _, p := range problems {
		if len(p.Mend) == 0 {
			return "banger did not put all of it there: put back what is wrong, or take it out of " + filepath.Join(dir, bundle.ManifestName)
		}
		if command := "banger " + shellLine(p.Mend); !slices.Contains(commands, command) {
			commands = append(commands, command)
		}
	}
	return "mend it with: " + strings.Join(commands, "; and: ")
}

func describeVerified(v runtimeVerifyView) string {
	if len(v.Problems) == 0 && v.Files == 0 {
		return fmt.Sprintf("nothing in %s has a checksum: no bundle was fetched and no Firecracker installed there\n", v.Directory)
	}
	if len(v.Problems) == 0 {
		return fmt.Sprintf("%d files in %s are as they were put there\n", v.Files, v.Directory)
	}
	return inFull(v.Problems)
}

type runtimePackageOptions struct {
	archive, kernel, image string
	output                 outputFormat
}

type runtimePackageView struct {
	Archive   string `json:"archive"`
	Manifest  string `json:"manifest"`
	SHA256    string `json:"sha256"`
	SizeBytes int64  `json:"size_bytes"`
	Files     int    `json:"files"`
}

// leftOut is the value of --kernel and --image that packs none.
const leftOut = "none"

func newRuntimePackageCommand(e *Env) *cobra.Command {
	var o runtimePackageOptions
	cmd := &cobra.Command{
		Use: "package", Short: "Pack a bundle of your kernel, image and Firecracker, with the manifest to fetch it by",
		Long: "Pack a kernel and an image of the catalogues, and the machine monitors of the runtime directory, into a bundle. The\n" +
			"manifest " + bundle.SourceFile + " beside it lists it. Put the two anywhere together, on a disk or a web server, and\n" +
			"fetch from there with: banger runtime fetch --manifest FILE.",
		Example: "banger runtime package\nbanger runtime package --image none --archive /srv/www/banger.tar.zst",
		Args:    noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runRuntimePackage(cmd.Context(), o, e) },
	}
	flags := cmd.Flags()
	flags.StringVar(&o.archive, "archive", supply.ArchiveName(shortVersion()), "file to write")
	flags.StringVar(&o.kernel, "kernel", "", "kernel to pack, or none (default: the default one)")
	flags.StringVar(&o.image, "image", "", "image to pack, or none (default: the default one)")
	for flag, complete := range map[string]completer{"kernel": e.completeKernels, "image": e.completeImages} {
		if err := cmd.RegisterFlagCompletionFunc(flag, complete); err != nil {
			panic(err) // the flags exist: they were added above
		}
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runRuntimePackage(ctx context.Context, o runtimePackageOptions, e *Env) error {
	return e.changeRuntime(ctx, saveLimit, func(ctx context.Context, place bundle.Place, store *supply.Store) error {
		b, err := bundle.Read(place.Dir)
		if err != nil {
			return err
		}
		packing := supply.PackOptions{Archive: o.archive, Version: shortVersion(), VMMs: map[string]string{}}
		for name, path := range b.Manifest.VMMs {
			packing.VMMs[name] = b.Path(path)
		}
		if packing.Kernel, packing.Image, err = e.artifactDirs(ctx, o); err != nil {
			return err
		}
		p, err := store.Pack(ctx, packing)
		if err != nil {
			return err
		}
		v := runtimePackageView{Archive: p.Archive, Manifest: p.Listing, SHA256: p.SHA256, SizeBytes: p.Bytes, Files: p.Files}
		return e.print(o.output, v, func() string {
			return fmt.Sprintf("%s (%s)\nfetch it with: banger runtime fetch --manifest %s\n", v.Archive, size(v.SizeBytes), v.Manifest)
		})
	})
}

// artifactDirs asks the daemon for the directories of the kernel and the image to pack; "" is none.
func (e *Env) artifactDirs(ctx context.Context, o runtimePackageOptions) (kernelDir, imageDir string, err error) {
	if o.kernel == leftOut && o.image == leftOut {
		return "", "", nil
	}
	c, err := e.connect(ctx)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	kernels, err := c.Images.ListKernels(ctx, &bangerv1.ListKernelsRequest{})
	if err != nil {
		return "", "", err
	}
	images, err := c.Images.ListImages(ctx, &bangerv1.ListImagesRequest{})
	if err != nil {
		return "", "", err
	}
	if kernelDir, err = pickDir("kernel", o.kernel, kernels.GetKernels()); err != nil {
		return "", "", err
	}
	imageDir, err = pickDir("image", o.image, images.GetImages())
	return kernelDir, imageDir, err
}

type catalogued interface {
	GetName() string
	GetIsDefault() bool
	GetProblem() string
	GetDirectory() string
}

// pickDir returns the directory of the named one, or of the default.
func pickDir[T catalogued](kind, name string, all []T) (string, error) {
	if name == leftOut {
		return "", nil
	}
	i := slices.IndexFunc(all, func(c T) bool { return name == "" && c.GetIsDefault() || name != "" && c.GetName() == name })
	switch {
	case i < 0 && name == "":
		return "", fault.New(fault.NotFound, "there is no default %s to pack", kind).
			WithHint("make one with: banger setup, or leave it out with: --%s none", kind)
	case i < 0:
		return "", fault.New(fault.NotFound, "there is no %s %q", kind, name).WithHint("see what there is: banger %s list", kind)
	case all[i].GetProblem() != "":
		return "", fault.New(fault.Precondition, "%s %s cannot be packed: %s", kind, all[i].GetName(), all[i].GetProblem())
	}
	return all[i].GetDirectory(), nil
}
