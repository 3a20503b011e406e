package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
)

func newVMPingCommand(e *Env) *cobra.Command {
	return showing(e, runVMPing, &cobra.Command{
		Use: "ping NAME", Short: "Ask a VM's agent for an answer, over the guest channel",
		Args: oneName, ValidArgsFunction: e.completeOneVM(isRunning),
	})
}

func runVMPing(ctx context.Context, o showOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.VMs.PingVM(ctx, &bangerv1.PingVMRequest{Vm: o.name})
		if err != nil {
			return err
		}
		trip := time.Duration(res.GetRoundTripNanos())
		v := pingView{
			Name: o.name, RoundTripSeconds: trip.Seconds(), AgentBuild: res.GetAgentBuild(),
			BootID: res.GetBootId(), UptimeSeconds: res.GetUptimeSeconds(),
		}
		return e.print(o.output, v, func() string {
			up := span(time.Duration(v.UptimeSeconds * float64(time.Second)))
			return fmt.Sprintf("%s answered in %.1f ms; up %s\n", v.Name, float64(trip)/1e6, up)
		})
	})
}
