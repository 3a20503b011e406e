package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

// buildLimit is how long a build, or the tests of an image, may take: software emulation is slow.
const buildLimit = 6 * time.Hour

type imageBuildOptions struct {
	recipe, from, size, name string
	keepFailed, makeDefault  bool
	output                   outputFormat

	sized bool
}

type builtView struct {
	Image   imageView   `json:"image"`
	LeftOut []string    `json:"left_out"`
	Stages  []stageView `json:"stages"`
}

type stageView struct {
	Stage   string  `json:"stage"`
	Seconds float64 `json:"seconds"`
}

func viewBuilt(b *bangerv1.BuiltImage) builtView {
	return builtView{Image: viewImage(b.GetImage()), LeftOut: list(b.GetLeftOut()), Stages: views(b.GetStages(), viewStage)}
}

func viewStage(t *bangerv1.StageTime) stageView { return stageView{t.GetStage(), t.GetSeconds()} }

// imageBuildView is how an image was built, for those who look at it later.
type imageBuildView struct {
	Recipe string      `json:"recipe"`
	Parent string      `json:"parent"`
	Kernel string      `json:"kernel"`
	Stages []stageView `json:"stages"`
	Stale  bool        `json:"stale"`
}

func viewImageBuild(b *bangerv1.ImageBuild) *imageBuildView {
	if b == nil {
		return nil
	}
	return &imageBuildView{
		Recipe: b.GetRecipe(), Parent: b.GetParent(), Kernel: b.GetKernel(), Stages: views(b.GetStages(), viewStage), Stale: b.GetStale(),
	}
}

func inSeconds(s float64) string { return seconds(time.Duration(s * float64(time.Second))) }

// fields are the lines about it in image show.
func (v *imageBuildView) fields() []field {
	if v == nil {
		return nil
	}
	total, times := 0.0, make([]string, len(v.Stages))
	for i, s := range v.Stages {
		total += s.Seconds
		times[i] = s.Stage + " " + inSeconds(s.Seconds)
	}
	return []field{
		{"recipe", v.Recipe},
		{"built on", v.Parent},
		{"built with", v.Kernel},
		{"built in", inSeconds(total) + " (" + strings.Join(times, ", ") + ")"},
	}
}

func newImageBuildCommand(e *Env) *cobra.Command {
	var o imageBuildOptions
	cmd := &cobra.Command{
		Use: "build RECIPE", Short: "Build an image from a recipe",
		Long: "Build an image from RECIPE: the name of one that came with banger (banger image recipes), or a directory with a\n" +
			"recipe.toml. The packages of a Debian base are installed at this machine's speed; a temporary VM does what needs a\n" +
			"running system. When it fails or is interrupted nothing is left but its log, whose path is in the error.",
		Example: "banger image build dev\nbanger image build ./my-recipe --name mine\nbanger image build ./my-recipe --from alpine --size 16G",
		Args:    oneName, ValidArgsFunction: e.completeRecipes,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.recipe, o.sized = args[0], cmd.Flags().Changed("size")
			return runImageBuild(cmd.Context(), o, e)
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.from, "from", "", "image to build on, instead of what the recipe says")
	f.StringVar(&o.size, "size", "", "what / can grow by while it is built, for instance 16G (default: what the recipe says)")
	f.StringVar(&o.name, "name", "", "name of the new image (default: of the recipe and the content)")
	f.BoolVar(&o.keepFailed, "keep-failed", false, "leave the temporary VM when the build fails")
	f.BoolVar(&o.makeDefault, "default", false, "make it the default image")
	if err := cmd.RegisterFlagCompletionFunc("from", e.completeImages); err != nil {
		panic("cli: " + err.Error()) // the flag is there
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runImageBuild(ctx context.Context, o imageBuildOptions, e *Env) error {
	req := &bangerv1.BuildImageRequest{From: o.from, Name: o.name, KeepFailed: o.keepFailed}
	var err error
	if req.Recipe, err = recipeArgument(o.recipe); err != nil {
		return err
	}
	if o.sized {
		if req.SizeBytes, err = parseSizeFlag("size", o.size); err != nil {
			return err
		}
	}
	return e.connected(ctx, buildLimit, func(ctx context.Context, c *client.Client) error {
		built, err := e.build(ctx, c, req, "", o.makeDefault)
		if err != nil {
			return err
		}
		v := viewBuilt(built)
		return e.print(o.output, v, func() string { return v.Image.Name + "\n" })
	})
}

// build builds with progress, each line of which begins with label unless that is empty, and tells once more at the end what the image is without.
func (e *Env) build(ctx context.Context, c *client.Client, req *bangerv1.BuildImageRequest, label string, makeDefault bool) (*bangerv1.BuiltImage, error) {
	d := e.newDisplay()
	built, err := c.BuildImage(ctx, req, d.sink(label))
	d.close()
	if err != nil {
		return nil, err
	}
	if makeDefault {
		if built.Image, err = e.setDefaultImage(ctx, c, built.GetImage().GetName()); err != nil {
			return nil, err
		}
	}
	for _, s := range built.GetLeftOut() {
		e.notice("left out: " + s)
	}
	return built, nil
}

// recipeArgument makes of what was typed what the daemon understands: a name, or an absolute path.
func recipeArgument(typed string) (string, error) {
	if !strings.ContainsRune(typed, filepath.Separator) && typed != "." && typed != ".." {
		return typed, nil
	}
	path, err := filepath.Abs(typed)
	if err != nil {
		return "", err
	}
	if filepath.Base(path) == "recipe.toml" {
		path = filepath.Dir(path)
	}
	if _, err := os.Stat(path); err != nil {
		return "", fault.Wrap(fault.NotFound, err, "there is no recipe")
	}
	return path, nil
}

type imageTestOptions struct {
	name       string
	keepFailed bool
	output     outputFormat
}

type testView struct {
	Image  string        `json:"image"`
	Passed bool          `json:"passed"`
	Tests  []outcomeView `json:"tests"`
	VM     string        `json:"vm"`
}

type outcomeView struct {
	Name    string  `json:"name"`
	Status  string  `json:"status"`
	Message string  `json:"message"`
	Seconds float64 `json:"seconds"`
}

func viewTest(t *bangerv1.ImageTest) testView {
	v := testView{Image: t.GetImage(), Passed: true, VM: t.GetVm(), Tests: views(t.GetTests(), viewOutcome)}
	for _, o := range v.Tests {
		v.Passed = v.Passed && o.Status != "failed"
	}
	return v
}

func viewOutcome(o *bangerv1.TestOutcome) outcomeView {
	v := outcomeView{Name: o.GetName(), Status: "failed", Message: o.GetMessage(), Seconds: o.GetSeconds()}
	switch {
	case o.GetPassed():
		v.Status = "passed"
	case o.GetSkipped():
		v.Status = "skipped"
	}
	return v
}

func newImageTestCommand(e *Env) *cobra.Command {
	var o imageTestOptions
	cmd := &cobra.Command{
		Use: "test NAME", Short: "Boot an image and run the tests of its recipe; exit code 1 when one fails",
		Args: oneName, ValidArgsFunction: firstOnly(e.completeImages),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return runImageTest(cmd.Context(), o, e)
		},
	}
	cmd.Flags().BoolVar(&o.keepFailed, "keep-failed", false, "leave the VM when a test fails")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runImageTest(ctx context.Context, o imageTestOptions, e *Env) error {
	return e.connected(ctx, buildLimit, func(ctx context.Context, c *client.Client) error {
		d := e.newDisplay()
		result, err := c.TestImage(ctx, &bangerv1.TestImageRequest{Name: o.name, KeepFailed: o.keepFailed}, d.sink(""))
		d.close()
		if err != nil {
			return err
		}
		v := viewTest(result)
		if err := e.print(o.output, v, func() string { return describeTests(v) }); err != nil {
			return err
		}
		if !v.Passed {
			return silent(int(fault.Unexpected))
		}
		return nil
	})
}

func describeTests(v testView) string {
	var b strings.Builder
	for _, t := range v.Tests {
		fmt.Fprintf(&b, "%s %s (%.1f s)\n", t.Status, fault.Printable(t.Name), t.Seconds)
		if t.Message != "" {
			b.WriteString("  " + indent(harmless(t.Message), 2))
		}
	}
	if v.VM != "" {
		fmt.Fprintf(&b, "look into it with: banger vm ssh %s\n", v.VM)
	}
	return b.String()
}

type recipeView struct {
	Name         string `json:"name"`
	Description  string `json:"description"`
	From         string `json:"from"`
	PackageCount int32  `json:"package_count"`
	Hash         string `json:"hash"`
}

func viewRecipe(r *bangerv1.Recipe) recipeView {
	return recipeView{r.GetName(), r.GetDescription(), r.GetFrom(), r.GetPackageCount(), r.GetHash()}
}

func newImageRecipesCommand(e *Env) *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "recipes", Short: "List the recipes that came with banger",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runImageRecipes(cmd.Context(), o, e) },
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runImageRecipes(ctx context.Context, o listOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Builds.ListRecipes(ctx, &bangerv1.ListRecipesRequest{})
		if err != nil {
			return err
		}
		all := views(res.GetRecipes(), viewRecipe)
		return e.print(o.output, all, func() string {
			rows := make([][]string, len(all))
			for i, r := range all {
				rows[i] = []string{r.Name, r.From, fmt.Sprint(r.PackageCount), r.Description}
			}
			return e.table([]column{{title: "NAME"}, {title: "FROM"}, {title: "PACKAGES", right: true}, {title: "DESCRIPTION", flexible: true}}, rows)
		})
	})
}

// completeRecipes offers the recipes that came with banger, and directories.
func (e *Env) completeRecipes(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	if strings.ContainsAny(toComplete, "./~") {
		return nil, cobra.ShellCompDirectiveFilterDirs
	}
	return e.completeFrom(func(ctx context.Context, c *client.Client) (names []string, err error) {
		res, err := c.Builds.ListRecipes(ctx, &bangerv1.ListRecipesRequest{})
		for _, r := range res.GetRecipes() {
			names = append(names, r.GetName()+"\t"+r.GetDescription())
		}
		return names, err
	})(cmd, args, toComplete)
}
