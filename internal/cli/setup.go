package cli

import (
	"context"
	"fmt"
	"path/filepath"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
)

type setupOptions struct {
	rebuild bool
	recipe  string
	output  outputFormat
}

func newSetupCommand(e *Env) *cobra.Command {
	var o setupOptions
	cmd := &cobra.Command{
		Use: "setup", Short: "Make what a fresh machine needs: the default kernel and image",
		Example: "banger setup\nbanger setup --image dev",
		Long:    "Make the default kernel and image from Debian's packages. What is in place stays; an interrupted run\nis taken up again.",
		Args:    noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runSetup(cmd.Context(), o, e) },
	}
	cmd.Flags().BoolVar(&o.rebuild, "rebuild", false, "make everything anew")
	cmd.Flags().StringVar(&o.recipe, "image", "", "also build the image of this recipe, for instance dev, and make it the default one")
	if err := cmd.RegisterFlagCompletionFunc("image", e.completeRecipes); err != nil {
		panic("cli: " + err.Error()) // the flag is there
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runSetup(ctx context.Context, o setupOptions, e *Env) error {
	recipe, err := recipeArgument(o.recipe)
	if err != nil {
		return err
	}
	limit := setupLimit
	if recipe != "" {
		limit = buildLimit
	}
	return e.connected(ctx, limit, func(ctx context.Context, c *client.Client) error {
		d := e.newDisplay()
		result, err := c.Setup(ctx, &bangerv1.SetupRequest{Rebuild: o.rebuild}, d.sink(""))
		d.close()
		if err != nil {
			return err
		}
		if recipe != "" {
			made, found, err := e.ensureBuilt(ctx, c, recipe, o.rebuild)
			if err != nil {
				return err
			}
			result.Image, result.AlreadyDone = made, result.GetAlreadyDone() && found
		}
		v := setupView{viewImage(result.GetImage()), viewKernel(result.GetKernel()), result.GetAlreadyDone()}
		return e.print(o.output, v, func() string {
			found := ""
			if v.AlreadyDone {
				found = " (already in place)"
			}
			return fmt.Sprintf("image %s and kernel %s are ready%s\n", v.Image.Name, v.Kernel.Name, found)
		})
	})
}

// ensureBuilt makes the image of a recipe the default one. It is built unless there is one that is as the recipe says.
func (e *Env) ensureBuilt(ctx context.Context, c *client.Client, recipe string, rebuild bool) (made *bangerv1.Image, found bool, err error) {
	if !rebuild {
		res, err := c.Images.GetImage(ctx, &bangerv1.GetImageRequest{Name: filepath.Base(recipe)})
		if b := res.GetImage().GetBuild(); err == nil && b.GetRecipe() == recipe && !b.GetStale() {
			def, err := e.setDefaultImage(ctx, c, res.GetImage().GetName())
			return def, true, err
		}
	}
	built, err := e.build(ctx, c, &bangerv1.BuildImageRequest{Recipe: recipe}, filepath.Base(recipe), true)
	return built.GetImage(), false, err
}
