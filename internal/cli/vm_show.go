package cli

import (
	"context"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
)

type showOptions struct {
	name   string
	output outputFormat
}

// showing makes cmd show one thing, whose name is its argument; empty where it may be left out and was.
func showing(e *Env, show func(context.Context, showOptions, *Env) error, cmd *cobra.Command) *cobra.Command {
	var o showOptions
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			o.name = args[0]
		}
		return show(cmd.Context(), o, e)
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func newVMShowCommand(e *Env) *cobra.Command {
	return showing(e, runVMShow, &cobra.Command{
		Use: "show NAME", Short: "Show all about a VM",
		Args: oneName, ValidArgsFunction: e.completeOneVM(isAny),
	})
}

func runVMShow(ctx context.Context, o showOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Vm: o.name})
		if err != nil {
			return err
		}
		v := viewVM(res.GetVm())
		return e.print(o.output, v, func() string { return e.describeVM(v) })
	})
}

func (e *Env) describeVM(v vmView) string {
	list := []field{
		{"name", v.Name},
		{"id", v.ID},
		{"state", v.State},
		{"error", v.Error},
		{"started", e.when(v.StartedAt)},
		{"created", e.when(v.CreatedAt)},
		{"image", v.Image},
		{"kernel", v.Kernel},
		{"vmm", vmmText(v)},
		{"slow because", v.SlowReason},
		{"cpus", fmt.Sprint(v.CPUs)},
		{"memory", size(v.MemoryBytes)},
		{"disk", size(v.DiskBytes)},
		{"work disk", size(v.WorkDiskBytes)},
		{"disk rate", rateText(v.DiskRate)},
		{"net rate", rateText(v.NetRate)},
		{"balloon", balloonText(v.Balloon)},
		{"units", v.Units},
		{"ip", v.IP},
		{"ipv6", v.IP6},
		{"dns name", v.DNSName},
		{"mac", v.MAC},
		{"nat", yesNo(v.NAT)},
		{"isolated", yesNo(v.Isolated)},
		{"ports", portsText(v.Ports)},
		{"directory", v.Directory},
	}
	if v.Ephemeral {
		list = append(list, field{"ephemeral", "yes: deleted when it stops"})
	}
	if v.PID > 0 {
		list = append(list, field{"pid", fmt.Sprint(v.PID)})
	}
	return fields(list)
}

// rateText is "" for none.
func rateText(bytes int64) string {
	if bytes == 0 {
		return ""
	}
	return size(bytes) + "/s"
}

func balloonText(has bool) string {
	if !has {
		return ""
	}
	return "unused memory goes back to the host"
}

func vmmText(v vmView) string {
	if v.Accelerator == "" || v.Accelerator == v.VMM {
		return v.VMM
	}
	return v.VMM + " (" + v.Accelerator + ")"
}

// when renders a moment both ways; "" for none.
func (e *Env) when(t *time.Time) string {
	if t == nil {
		return ""
	}
	return e.age(t) + ", " + t.UTC().Format("2006-01-02 15:04:05 UTC")
}
