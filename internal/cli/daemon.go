package cli

import (
	"context"
	"fmt"
	"net"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
	"banger/internal/paths"
)

func newDaemonCommand(e *Env) *cobra.Command {
	return group(
		"daemon", "The daemon behind the commands",
		newDaemonStartCommand(e), newDaemonStopCommand(e), newDaemonRestartCommand(e),
		newDaemonStatusCommand(e), newDaemonLogsCommand(e),
	)
}

func newDaemonStartCommand(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "start", Short: "Start the daemon (other commands do so when needed)",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDaemonStart(cmd.Context(), e) },
	}
}

func runDaemonStart(ctx context.Context, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		return e.tellDaemon(ctx, c)
	})
}

// tellDaemon prints which daemon runs now.
func (e *Env) tellDaemon(ctx context.Context, c *client.Client) error {
	s, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
	if err != nil {
		return err
	}
	e.notice(fmt.Sprintf("daemon runs, pid %d, build %s", s.GetPid(), s.GetBuild()))
	return nil
}

func newDaemonStopCommand(e *Env) *cobra.Command {
	var allVMs bool
	cmd := &cobra.Command{
		Use: "stop", Short: "Stop the daemon; VMs run on",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDaemonStop(cmd.Context(), allVMs, e) },
	}
	cmd.Flags().BoolVar(&allVMs, "all-vms", false, "stop all VMs first")
	return cmd
}

func runDaemonStop(ctx context.Context, allVMs bool, e *Env) error {
	limit := quickLimit
	if allVMs {
		limit = stopLimit
	}
	return e.within(ctx, limit, func(ctx context.Context) error {
		if allVMs {
			if err := e.stopAll(ctx); err != nil {
				return err
			}
		}
		ran, err := client.Stop(ctx, e.Paths)
		switch {
		case err != nil:
			return err
		case ran && allVMs:
			e.notice("all VMs and the daemon stopped")
		case ran:
			e.notice("daemon stopped; VMs run on")
		default:
			e.notice("daemon is not running")
		}
		return nil
	})
}

func newDaemonRestartCommand(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "restart", Short: "Stop the daemon and start it again; VMs run on",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDaemonRestart(cmd.Context(), e) },
	}
}

func runDaemonRestart(ctx context.Context, e *Env) error {
	return e.within(ctx, quickLimit, func(ctx context.Context) error {
		if err := client.Renew(ctx, client.Options{Paths: e.Paths}); err != nil {
			return err
		}
		c, err := e.connect(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		return e.tellDaemon(ctx, c)
	})
}

func newDaemonStatusCommand(e *Env) *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use: "status", Short: "Show what the daemon is and does; exit code 3 when it does not run",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDaemonStatus(cmd.Context(), output, e) },
	}
	addOutputFlag(cmd, &output)
	return cmd
}

// runDaemonStatus never starts a daemon: a question must not change its answer.
func runDaemonStatus(ctx context.Context, output outputFormat, e *Env) error {
	return e.within(ctx, quickLimit, func(ctx context.Context) error {
		socket := e.Paths.Socket()
		if err := paths.CheckSocket(socket); err != nil {
			return err
		}
		if !listens(ctx, socket) {
			err := e.print(output, viewDaemon(nil, socket), func() string { return "daemon:  not running\n" })
			if err != nil {
				return err
			}
			return silent(int(fault.NotFound))
		}
		c, err := e.Dial(ctx, false)
		if err != nil {
			return err
		}
		defer c.Close()
		s, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
		if err != nil {
			return err
		}
		v := viewDaemon(s, socket)
		return e.print(output, v, func() string { return e.describeDaemon(v) })
	})
}

func listens(ctx context.Context, socket string) bool {
	conn, err := (&net.Dialer{Timeout: time.Second}).DialContext(ctx, "unix", socket)
	if err != nil {
		return false
	}
	_ = conn.Close()
	return true
}

func (e *Env) describeDaemon(v daemonView) string {
	list := []field{
		{"daemon", fmt.Sprintf("running, pid %d", v.PID)},
		{"build", v.Build},
		{"started", e.when(v.StartedAt)},
		{"vms", fmt.Sprintf("%d, %d of them running", v.VMCount, v.RunningCount)},
		{"default vmm", withReason(v.DefaultVMM, v.DefaultVMMReason)},
	}
	for _, d := range v.Drivers {
		list = append(list, field{"driver " + d.Name, describeDriver(d)})
	}
	if served := v.DNS.Listener; served != "" || v.DNS.Forwarder != "" {
		list = append(list, field{"names", describeNames(v.DNS)})
	}
	list = append(list, field{"names not served", v.DNS.Problem})
	list = append(list, field{"network", strings.TrimSpace(v.Bridge + " " + v.Subnet)}, field{"state", v.StateDirectory}, field{"socket", v.Socket})
	list = append(list,
		field{"ipv6 network", v.Network.Subnet6}, field{"network problem", v.Network.SubnetProblem},
		field{"tap devices", fmt.Sprintf("%d of %d ready", v.Network.TAPsReady, v.Network.TAPsWanted)},
		field{"opened chains", strings.Join(v.Network.OpenedChains, ", ")},
	)
	for _, notice := range v.Network.Notices {
		list = append(list, field{"network notice", notice})
	}
	for _, mended := range v.Reconciled {
		list = append(list, field{"mended at start", mended})
	}
	return fields(list)
}

func describeDriver(d driverView) string {
	if !d.Available {
		return withReason("not available", d.Reason)
	}
	return withReason(strings.Join(strings.Fields(d.Version+" "+d.Accelerator), " "), d.Reason)
}

func withReason(text, reason string) string {
	if reason == "" {
		return text
	}
	return text + ": " + reason
}

// describeNames tells where names are served, and how many there are.
func describeNames(d dnsDaemonView) string {
	text := plural(int(d.Records), "name")
	if d.Listener != "" {
		text += " on " + d.Listener
	}
	if d.Forwarder != "" {
		text += ", for guests on " + d.Forwarder
	}
	return text
}
