package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
)

type setupOptions struct {
	rebuild bool
	output  outputFormat
}

func newSetupCommand(e *Env) *cobra.Command {
	var o setupOptions
	cmd := &cobra.Command{
		Use: "setup", Short: "Make what a fresh machine needs: the default kernel and image",
		Long: "Make the default kernel and image from Debian's packages. What is in place stays; an interrupted run\nis taken up again.",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runSetup(cmd.Context(), o, e) },
	}
	cmd.Flags().BoolVar(&o.rebuild, "rebuild", false, "make everything anew")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runSetup(ctx context.Context, o setupOptions, e *Env) error {
	return e.within(ctx, setupLimit, func(ctx context.Context) error {
		c, err := e.connect(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		d := e.newDisplay()
		result, err := c.Setup(ctx, &bangerv1.SetupRequest{Rebuild: o.rebuild}, d.sink(""))
		d.close()
		if err != nil {
			return err
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
