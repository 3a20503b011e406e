package cli

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

// newInternalNATCommand switches a VM's NAT by hand, for whoever looks for what is wrong: it is "vm set --nat" and what
// the daemon knows of the host's packet filter.
func newInternalNATCommand(e *Env) *cobra.Command {
	return group("nat", "NAT of one VM",
		newInternalNATSwitch(e, "up", true), newInternalNATSwitch(e, "down", false), newInternalNATStatus(e))
}

func newInternalNATSwitch(e *Env, use string, on bool) *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use: use + " NAME", Short: "Switch NAT of a VM " + map[bool]string{true: "on", false: "off"}[on],
		Args: oneName, ValidArgsFunction: e.completeOneVM(isAny),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.tellNAT(cmd.Context(), output, func(ctx context.Context, c *client.Client) (*bangerv1.VM, error) {
				res, err := c.VMs.SetVM(ctx, &bangerv1.SetVMRequest{Vm: args[0], Nat: &on})
				return res.GetVm(), err
			})
		},
	}
	addOutputFlag(cmd, &output)
	return cmd
}

func newInternalNATStatus(e *Env) *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use: "status NAME", Short: "Show NAT of a VM",
		Args: oneName, ValidArgsFunction: e.completeOneVM(isAny),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.tellNAT(cmd.Context(), output, func(ctx context.Context, c *client.Client) (*bangerv1.VM, error) {
				res, err := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Vm: args[0]})
				return res.GetVm(), err
			})
		},
	}
	addOutputFlag(cmd, &output)
	return cmd
}

// natView is a VM's NAT, and what there is of the host's packet filter for all VMs.
type natView struct {
	Name         string   `json:"name"`
	NAT          bool     `json:"nat"`
	Active       bool     `json:"active"` // it is on and the VM runs
	IP           string   `json:"ip"`
	OpenedChains []string `json:"opened_chains"`
	Notices      []string `json:"notices"`
}

func (e *Env) tellNAT(ctx context.Context, output outputFormat, ask func(context.Context, *client.Client) (*bangerv1.VM, error)) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		v, err := ask(ctx, c)
		if err != nil {
			return err
		}
		s, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		view := natView{
			Name: v.GetName(), NAT: v.GetNat(), Active: v.GetNat() && v.GetPid() > 0, IP: v.GetIp(),
			OpenedChains: list(s.GetNetwork().GetOpenedChains()), Notices: list(s.GetNetwork().GetNotices()),
		}
		return e.print(output, view, func() string {
			return fields([]field{
				{"vm", view.Name},
				{"ip", view.IP},
				{"nat", yesNo(view.NAT)},
				{"active", yesNo(view.Active)},
				{"opened chains", strings.Join(view.OpenedChains, ", ")},
				{"notices", strings.Join(view.Notices, "; ")},
			})
		})
	})
}

// newInternalCleanCommand takes banger off the host's network, while the daemon does not run.
func newInternalCleanCommand(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "clean", Short: "Remove what banger made in this host's network; no VM and no daemon may run",
		Long: "Remove the bridge, the TAP devices and the packet filter's rules that banger made, and put back what they\n" +
			"needed. VMs and their disks stay. Stop all first: banger daemon stop --all-vms",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return e.within(cmd.Context(), quickLimit, func(ctx context.Context) error {
				code, err := client.Clean(ctx, client.Options{Paths: e.Paths}, e.Stdout)
				if err == nil && code != 0 {
					return silent(code) // bangerd has said why
				}
				return err
			})
		},
	}
}

// stopAll stops every VM that runs, and drops no suspended one's memory.
func (e *Env) stopAll(ctx context.Context) error {
	c, err := e.connect(ctx)
	if err != nil {
		return err
	}
	all, err := c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
	c.Close()
	if err != nil {
		return err
	}
	o := lifecycleOptions{}
	for _, v := range all.GetVms() {
		if isUp(v.GetState()) && !isSuspended(v.GetState()) {
			o.names = append(o.names, v.GetName())
		}
	}
	if len(o.names) == 0 {
		return nil
	}
	if err := runLifecycle(ctx, o, verb{ask: askStop}, e); err != nil {
		return fault.Wrap(fault.KindOf(err), err, "the daemon was not stopped, for VMs were not").WithHint("kill them: banger vm kill NAME...")
	}
	return nil
}
