package cli

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

type snapshotView struct {
	Tag           string            `json:"tag"`
	CreatedAt     *time.Time        `json:"created_at"`
	Note          string            `json:"note"`
	Labels        map[string]string `json:"labels"`
	Kind          string            `json:"kind"`
	State         string            `json:"state"`
	Image         string            `json:"image"`
	Kernel        string            `json:"kernel"`
	Driver        string            `json:"driver"`
	DriverVersion string            `json:"driver_version"`
	ApparentBytes int64             `json:"apparent_bytes"`
	RealBytes     int64             `json:"real_bytes"`
	PauseSeconds  float64           `json:"pause_seconds"`
	Problem       string            `json:"problem"`
	Directory     string            `json:"directory"`
}

func viewSnapshot(s *bangerv1.Snapshot) snapshotView {
	labels := s.GetLabels()
	if labels == nil {
		labels = map[string]string{}
	}
	return snapshotView{
		Tag: s.GetTag(), CreatedAt: viewTime(s.GetCreatedAt()), Note: s.GetNote(), Labels: labels, Kind: s.GetKind(), State: s.GetState(),
		Image: s.GetImage(), Kernel: s.GetKernel(), Driver: s.GetDriver(), DriverVersion: s.GetDriverVersion(),
		ApparentBytes: s.GetApparentBytes(), RealBytes: s.GetRealBytes(), PauseSeconds: time.Duration(s.GetPauseNanos()).Seconds(),
		Problem: s.GetProblem(), Directory: s.GetDirectory(),
	}
}

// labelText renders labels as they are given: "a=1 b=2".
func labelText(labels map[string]string) string {
	var all []string
	for _, k := range slices.Sorted(maps.Keys(labels)) {
		all = append(all, k+"="+labels[k])
	}
	return strings.Join(all, " ")
}

func newVMSnapshotCommand(e *Env) *cobra.Command {
	cmd := group(
		"snapshot", "Snapshots: copies of a VM to go back to",
		newSnapshotCreateCommand(e), newSnapshotListCommand(e), newSnapshotShowCommand(e), newSnapshotRestoreCommand(e), newSnapshotDeleteCommand(e),
	)
	cmd.Long = "Snapshots are copies of a VM at one moment, which it can be put back to: its disks, and also the memory of one that\n" +
		"runs or is suspended. They belong to their VM and are deleted with it. A tag names one of them."
	return cmd
}

type snapshotCreateOptions struct {
	vm, tag, note string
	labels        []string
	output        outputFormat
}

func newSnapshotCreateCommand(e *Env) *cobra.Command {
	var o snapshotCreateOptions
	cmd := &cobra.Command{
		Use: "create NAME [TAG]", Short: "Make a snapshot of a VM",
		Long: "Make a snapshot of a VM. One that runs stands still meanwhile, and runs on. Without a tag it is called by the time;\n" +
			"the tag is printed in the end.",
		Example: "banger vm snapshot create web before-upgrade --note 'still on 11'\nbanger vm snapshot create web --label by=ci",
		Args:    nameAndTag(false), ValidArgsFunction: e.completeOneVM(isAny),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.vm = args[0]
			if len(args) > 1 {
				o.tag = args[1]
			}
			return runSnapshotCreate(cmd.Context(), o, e)
		},
	}
	cmd.Flags().StringVar(&o.note, "note", "", "a text to keep with it")
	cmd.Flags().StringArrayVar(&o.labels, "label", nil, "a label to keep with it, `KEY=TEXT`; may be repeated")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runSnapshotCreate(ctx context.Context, o snapshotCreateOptions, e *Env) error {
	labels, err := parseLabels(o.labels)
	if err != nil {
		return err
	}
	return e.connected(ctx, saveLimit, func(ctx context.Context, c *client.Client) error {
		d := e.newDisplay()
		defer d.close()
		made, err := c.CreateSnapshot(ctx, &bangerv1.CreateSnapshotRequest{Vm: o.vm, Tag: o.tag, Note: o.note, Labels: labels}, d.sink(""))
		if err != nil {
			return err
		}
		return e.print(o.output, viewSnapshot(made), func() string { return made.GetTag() + "\n" })
	})
}

func parseLabels(words []string) (map[string]string, error) {
	labels := map[string]string{}
	for _, w := range words {
		key, text, ok := strings.Cut(w, "=")
		if !ok || key == "" {
			return nil, fault.New(fault.Usage, "%q is no label", w).WithHint("write it as KEY=TEXT")
		}
		if _, twice := labels[key]; twice {
			return nil, fault.New(fault.Usage, "label %s is given twice", key)
		}
		labels[key] = text
	}
	return labels, nil
}

func newSnapshotListCommand(e *Env) *cobra.Command {
	return showing(e, runSnapshotList, &cobra.Command{
		Use: "list NAME", Aliases: []string{"ls"}, Short: "List the snapshots of a VM, oldest first",
		Args: oneName, ValidArgsFunction: e.completeOneVM(isAny),
	})
}

func runSnapshotList(ctx context.Context, o showOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Snapshots.ListSnapshots(ctx, &bangerv1.ListSnapshotsRequest{Vm: o.name})
		if err != nil {
			return err
		}
		all := views(res.GetSnapshots(), viewSnapshot)
		return e.print(o.output, all, func() string { return e.snapshotTable(all) })
	})
}

func (e *Env) snapshotTable(all []snapshotView) string {
	columns := []column{
		{title: "TAG"},
		{title: "KIND"},
		{title: "CREATED"},
		{title: "SIZE", right: true},
		{title: "ON DISK", right: true},
		{title: "LABELS", flexible: true},
		{title: "NOTE", flexible: true},
		{title: "PROBLEM", flexible: true},
	}
	rows := make([][]string, len(all))
	for i, v := range all {
		note, _, _ := strings.Cut(v.Note, "\n")
		rows[i] = []string{
			v.Tag, dash(v.Kind), e.age(v.CreatedAt), size(v.ApparentBytes), size(v.RealBytes), dash(labelText(v.Labels)),
			dash(strings.ReplaceAll(note, "\t", " ")), dash(v.Problem),
		}
	}
	return e.table(columns, rows)
}

type snapshotOptions struct {
	vm, tag   string
	yes       bool
	disksOnly bool
	output    outputFormat
}

func newSnapshotShowCommand(e *Env) *cobra.Command {
	var o snapshotOptions
	cmd := &cobra.Command{
		Use: "show NAME TAG", Short: "Show all about a snapshot",
		Args: nameAndTag(true), ValidArgsFunction: e.completeSnapshots(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.vm, o.tag = args[0], args[1]
			return runSnapshotShow(cmd.Context(), o, e)
		},
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runSnapshotShow(ctx context.Context, o snapshotOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Snapshots.GetSnapshot(ctx, &bangerv1.GetSnapshotRequest{Vm: o.vm, Tag: o.tag})
		if err != nil {
			return err
		}
		v := viewSnapshot(res.GetSnapshot())
		return e.print(o.output, v, func() string { return e.describeSnapshot(v) })
	})
}

func (e *Env) describeSnapshot(v snapshotView) string {
	list := []field{
		{"tag", v.Tag},
		{"kind", v.Kind},
		{"created", e.when(v.CreatedAt)},
		{"vm was", v.State},
		{"image", v.Image},
		{"kernel", v.Kernel},
		{"size", size(v.ApparentBytes)},
		{"on disk", size(v.RealBytes)},
		{"labels", labelText(v.Labels)},
		{"note", strings.ReplaceAll(v.Note, "\n", " ")},
		{"directory", v.Directory},
	}
	if v.Driver != "" {
		list = append(list, field{"memory of", strings.TrimSpace(v.Driver + " " + v.DriverVersion)})
	}
	if v.PauseSeconds > 0 {
		list = append(list, field{"paused for", fmt.Sprintf("%.3f s", v.PauseSeconds)})
	}
	return fields(list)
}

func newSnapshotRestoreCommand(e *Env) *cobra.Command {
	var o snapshotOptions
	cmd := &cobra.Command{
		Use: "restore NAME TAG", Short: "Put a VM back to a snapshot",
		Long: "Put a VM back to a snapshot. What it wrote since is lost. With a snapshot that has the memory its programs go on\n" +
			"where they were; otherwise it is stopped. A VM that runs: on a terminal it asks first, elsewhere --yes is needed.",
		Example: "banger vm snapshot restore web before-upgrade",
		Args:    nameAndTag(true), ValidArgsFunction: e.completeSnapshots(1),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.vm, o.tag = args[0], args[1]
			return runSnapshotRestore(cmd.Context(), o, e)
		},
	}
	cmd.Flags().BoolVarP(&o.yes, "yes", "y", false, "also when the VM runs, and do not ask")
	cmd.Flags().BoolVar(&o.disksOnly, "disks-only", false, "leave the memory out: the VM is stopped afterwards")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runSnapshotRestore(ctx context.Context, o snapshotOptions, e *Env) error {
	return e.connected(ctx, saveLimit, func(ctx context.Context, c *client.Client) error {
		running, err := e.mayRestore(ctx, c, o)
		if err != nil {
			return err
		}
		d := e.newDisplay()
		defer d.close()
		req := &bangerv1.RestoreSnapshotRequest{Vm: o.vm, Tag: o.tag, DisksOnly: o.disksOnly, Running: running}
		v, err := c.RestoreSnapshot(ctx, req, d.sink(""))
		if err != nil {
			return err
		}
		return e.print(o.output, viewVM(v), func() string { return v.GetName() + "\n" })
	})
}

// mayRestore asks whether a VM that runs may be put back. What a script may not do is the daemon's to say.
func (e *Env) mayRestore(ctx context.Context, c *client.Client, o snapshotOptions) (running bool, err error) {
	if o.yes || !e.isAsked() {
		return o.yes, nil
	}
	res, err := c.VMs.GetVM(ctx, &bangerv1.GetVMRequest{Vm: o.vm})
	if err != nil || !isRunning(res.GetVm().GetState()) {
		return false, err
	}
	question := fmt.Sprintf("%s runs. Put it back to %s, and lose what it did and wrote since?", o.vm, o.tag)
	return true, e.confirm(question, "nothing was restored")
}

func newSnapshotDeleteCommand(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "delete NAME TAG...", Aliases: []string{"rm"}, Short: "Delete snapshots of a VM; the VM stays as it is",
		Args: nameAndTags, ValidArgsFunction: e.completeSnapshots(-1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return runSnapshotDelete(cmd.Context(), args[0], distinct(args[1:]), e)
		},
	}
}

func runSnapshotDelete(ctx context.Context, name string, tags []string, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		var failed severalErrors
		for _, tag := range tags {
			if _, err := c.Snapshots.DeleteSnapshot(ctx, &bangerv1.DeleteSnapshotRequest{Vm: name, Tag: tag}); err != nil {
				failed = append(failed, err)
			}
		}
		if len(failed) == 0 {
			return nil
		}
		return failed
	})
}

// completeSnapshots completes a VM and then up to most of its tags; negative: any number.
func (e *Env) completeSnapshots(most int) completer {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		if len(args) == 0 {
			return e.completeVMs(isAny)(cmd, args, toComplete)
		}
		if most >= 0 && len(args) > most {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return e.completeFrom(func(ctx context.Context, c *client.Client) (tags []string, err error) {
			res, err := c.Snapshots.ListSnapshots(ctx, &bangerv1.ListSnapshotsRequest{Vm: args[0]})
			for _, s := range res.GetSnapshots() {
				tags = append(tags, s.GetTag()+"\t"+s.GetKind())
			}
			return tags, err
		})(cmd, args[1:], toComplete)
	}
}
