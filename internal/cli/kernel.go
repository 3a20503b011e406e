package cli

import (
	"context"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
)

func newKernelListCommand(e *Env) *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List kernels",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runKernelList(cmd.Context(), o, e) },
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runKernelList(ctx context.Context, o listOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Images.ListKernels(ctx, &bangerv1.ListKernelsRequest{})
		if err != nil {
			return err
		}
		kernels := views(res.GetKernels(), viewKernel)
		return e.print(o.output, kernels, func() string { return e.kernelTable(kernels) })
	})
}

func (e *Env) kernelTable(kernels []kernelView) string {
	columns := []column{
		{title: "NAME", flexible: true},
		{title: "DEFAULT"},
		{title: "RELEASE", flexible: true},
		{title: "SIZE", right: true},
		{title: "PROBLEM"},
	}
	rows, problems := make([][]string, len(kernels)), make([]string, len(kernels))
	for i, v := range kernels {
		rows[i] = []string{v.Name, defaultMark(v.DefaultFrom), v.Release, size(v.SizeBytes), problemMark(v.Problem)}
		problems[i] = v.Problem
	}
	return e.table(columns, rows) + inFull(problems)
}
