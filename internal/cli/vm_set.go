package cli

import (
	"context"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

func newVMSetCommand(e *Env) *cobra.Command {
	var nat, isolated bool
	var changed func(flag string) bool
	cmd, _ := newLifecycleCommand(e, verb{
		use: "set NAME...", short: "Change what VMs may reach", limit: quickLimit,
		long: "Change what VMs may reach: at once when they run, and whenever they do. With NAT a VM reaches other networks\n" +
			"through this host. An isolated VM and its siblings do not reach each other.",
		example: "banger vm set web --nat=false\nbanger vm set web db --isolated",
		ask: func(ctx context.Context, c *client.Client, name string, _ lifecycleOptions, _ client.Sink) (*bangerv1.VM, error) {
			req := &bangerv1.SetVMRequest{Vm: name}
			if changed("nat") {
				req.Nat = &nat
			}
			if changed("isolated") {
				req.Isolated = &isolated
			}
			res, err := c.VMs.SetVM(ctx, req)
			return res.GetVm(), err
		},
	})
	cmd.Flags().BoolVar(&nat, "nat", true, "reach other networks through this host")
	cmd.Flags().BoolVar(&isolated, "isolated", true, "reach no siblings, and be reached by none")
	for _, flag := range []string{"nat", "isolated"} {
		cmd.Flags().Lookup(flag).DefValue = "" // what is not given stays
	}
	changed = cmd.Flags().Changed
	work := cmd.RunE
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if !changed("nat") && !changed("isolated") {
			return fault.New(fault.Usage, "nothing to change is given").WithHint("for example: banger vm set %s --nat=false", args[0])
		}
		return work(cmd, args)
	}
	return cmd
}
