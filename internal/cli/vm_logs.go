package cli

import (
	"context"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
)

type logsOptions struct {
	name   string
	vmm    bool
	follow bool
	lines  int32
}

func newVMLogsCommand(e *Env) *cobra.Command {
	var o logsOptions
	cmd := &cobra.Command{
		Use: "logs NAME", Short: "Show a VM's console, or its VMM's output",
		Args: oneName, ValidArgsFunction: e.completeOneVM(isAny),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return runVMLogs(cmd.Context(), o, e)
		},
	}
	cmd.Flags().BoolVar(&o.vmm, "vmm", false, "the VMM's own output instead of the guest's console")
	addLogFlags(cmd, &o.follow, &o.lines)
	return cmd
}

func addLogFlags(cmd *cobra.Command, follow *bool, lines *int32) {
	cmd.Flags().BoolVarP(follow, "follow", "f", false, "go on with what is added")
	cmd.Flags().Int32VarP(lines, "lines", "n", 0, "only the last lines (0: all)")
}

func checkLines(lines int32) error {
	if lines < 0 {
		return fault.New(fault.Usage, "--lines %d is negative", lines)
	}
	return nil
}

func runVMLogs(ctx context.Context, o logsOptions, e *Env) error {
	if err := checkLines(o.lines); err != nil {
		return err
	}
	if o.follow && e.timeout == 0 {
		return explain(ctx, copyLog(ctx, o, e)) // until the reader has enough
	}
	return e.within(ctx, quickLimit, func(ctx context.Context) error { return copyLog(ctx, o, e) })
}

func copyLog(ctx context.Context, o logsOptions, e *Env) error {
	c, err := e.connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	req := &bangerv1.ReadLogRequest{Vm: o.name, Source: bangerv1.ReadLogRequest_SOURCE_SERIAL, TailLines: o.lines, Follow: o.follow}
	if o.vmm {
		req.Source = bangerv1.ReadLogRequest_SOURCE_VMM
	}
	stream, err := c.VMs.ReadLog(ctx, req)
	if err != nil {
		return err
	}
	defer stream.Close()
	for stream.Receive() {
		if _, err := e.Stdout.Write(stream.Msg().GetData()); err != nil {
			return err
		}
	}
	return stream.Err()
}
