package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
)

type listOptions struct {
	output outputFormat
	names  bool
}

func newVMListCommand(e *Env) *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List VMs",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runVMList(cmd.Context(), o, e) },
	}
	cmd.Flags().BoolVar(&o.names, "names", false, "only the names, one on a line")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runVMList(ctx context.Context, o listOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
		if err != nil {
			return err
		}
		vms := views(res.GetVms(), viewVM)
		return e.print(o.output, vms, func() string {
			if o.names {
				return vmNames(vms)
			}
			return e.vmTable(vms)
		})
	})
}

func vmNames(vms []vmView) string {
	text := ""
	for _, v := range vms {
		text += v.Name + "\n"
	}
	return text
}

func (e *Env) vmTable(vms []vmView) string {
	columns := []column{
		{title: "NAME", flexible: true},
		{title: "STATE"},
		{title: "IP"},
		{title: "CPUS", right: true},
		{title: "MEMORY", right: true},
		{title: "IMAGE", flexible: true},
		{title: "STARTED"},
	}
	if e.colour(e.Stdout) {
		columns[1].paint = paintState
	}
	rows := make([][]string, len(vms))
	for i, v := range vms {
		rows[i] = []string{
			v.Name, v.State, dash(v.IP), fmt.Sprint(v.CPUs), size(v.MemoryBytes), v.Image, e.age(v.StartedAt),
		}
	}
	return e.table(columns, rows)
}
