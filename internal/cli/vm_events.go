package cli

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

type eventsOptions struct {
	name   string
	limit  int32
	output outputFormat
}

func newVMEventsCommand(e *Env) *cobra.Command {
	var o eventsOptions
	cmd := &cobra.Command{
		Use: "events NAME", Short: "Show what was done to a VM, stage by stage, also after it is gone",
		Args: oneName, ValidArgsFunction: e.completeOneVM(isAny),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return runVMEvents(cmd.Context(), o, e)
		},
	}
	cmd.Flags().Int32VarP(&o.limit, "lines", "n", 0, "only the newest, at most 1000 (0: 100)")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runVMEvents(ctx context.Context, o eventsOptions, e *Env) error {
	if o.limit < 0 || o.limit > 1000 {
		return fault.New(fault.Usage, "--lines %d is not between 0 and 1000", o.limit)
	}
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.VMs.ListEvents(ctx, &bangerv1.ListEventsRequest{Vm: o.name, Limit: o.limit})
		if err != nil {
			return err
		}
		events := views(res.GetEvents(), viewEvent)
		return e.print(o.output, events, func() string { return e.eventTable(events) })
	})
}

type eventView struct {
	ID           int64      `json:"id"`
	VMID         string     `json:"vm_id"`
	At           *time.Time `json:"at"`
	Operation    string     `json:"operation"`
	Stage        string     `json:"stage"`
	Message      string     `json:"message"`
	DurationNano int64      `json:"duration_nanos"`
}

func viewEvent(v *bangerv1.Event) eventView {
	return eventView{
		ID: v.GetId(), VMID: v.GetVmId(), At: viewTime(v.GetAt()), Operation: v.GetOperation(), Stage: v.GetStage(),
		Message: v.GetMessage(), DurationNano: v.GetDurationNanos(),
	}
}

func (e *Env) eventTable(events []eventView) string {
	columns := []column{
		{title: "AT"},
		{title: "OPERATION"},
		{title: "STAGE"},
		{title: "TOOK", right: true},
		{title: "MESSAGE", flexible: true},
	}
	rows := make([][]string, len(events))
	for i, v := range events {
		at := "-"
		if v.At != nil {
			at = v.At.Local().Format(time.DateTime)
		}
		rows[i] = []string{at, v.Operation, v.Stage, seconds(time.Duration(v.DurationNano)), dash(v.Message)}
	}
	return e.table(columns, rows)
}
