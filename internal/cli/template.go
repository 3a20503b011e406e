package cli

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

type templateView struct {
	Key         string     `json:"key"`
	Image       string     `json:"image"`
	Kernel      string     `json:"kernel"`
	VMM         string     `json:"vmm"`
	CPUs        int32      `json:"cpus"`
	MemoryBytes int64      `json:"memory_bytes"`
	Units       string     `json:"units"`
	SizeBytes   int64      `json:"size_bytes"`
	CreatedAt   *time.Time `json:"created_at"`
	LastUsedAt  *time.Time `json:"last_used_at"`
	Uses        int64      `json:"uses"`
	Problem     string     `json:"problem"`
	Directory   string     `json:"directory"`
}

func viewTemplate(t *bangerv1.Template) templateView {
	return templateView{
		Key: t.GetKey(), Image: t.GetImage(), Kernel: t.GetKernel(), VMM: t.GetVmm(), CPUs: t.GetCpus(), MemoryBytes: t.GetMemoryBytes(),
		Units: t.GetUnits(), SizeBytes: t.GetSizeBytes(), CreatedAt: viewTime(t.GetCreatedAt()), LastUsedAt: viewTime(t.GetLastUsedAt()),
		Uses: t.GetUses(), Problem: t.GetProblem(), Directory: t.GetDirectory(),
	}
}

func newTemplateCommand(e *Env) *cobra.Command {
	cmd := group(
		"template", "Templates: VMs booted once, which new ones are restored from",
		newTemplateListCommand(e), newTemplateShowCommand(e), newTemplateDeleteCommand(e), newTemplateWarmCommand(e),
	)
	cmd.Long = "Templates are VMs booted once and saved with memory and disks; new VMs of the same shape (image, kernel, machine\n" +
		"monitor, CPUs, memory, units) are restored from them. banger makes them by itself, after the first boot of a shape,\n" +
		"and removes those that nobody uses."
	return cmd
}

func newTemplateListCommand(e *Env) *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List templates",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runTemplateList(cmd.Context(), o, e) },
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runTemplateList(ctx context.Context, o listOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Templates.ListTemplates(ctx, &bangerv1.ListTemplatesRequest{})
		if err != nil {
			return err
		}
		all := views(res.GetTemplates(), viewTemplate)
		return e.print(o.output, all, func() string { return e.templateTable(all) })
	})
}

func (e *Env) templateTable(all []templateView) string {
	columns := []column{
		{title: "KEY"},
		{title: "IMAGE", flexible: true},
		{title: "VMM"},
		{title: "CPUS", right: true},
		{title: "MEMORY", right: true},
		{title: "SIZE", right: true},
		{title: "USES", right: true},
		{title: "CREATED"},
		{title: "PROBLEM", flexible: true},
	}
	rows := make([][]string, len(all))
	for i, v := range all {
		rows[i] = []string{
			v.Key, dash(v.Image), dash(v.VMM), fmt.Sprint(v.CPUs), size(v.MemoryBytes), size(v.SizeBytes), fmt.Sprint(v.Uses),
			e.age(v.CreatedAt), dash(v.Problem),
		}
	}
	return e.table(columns, rows)
}

func newTemplateShowCommand(e *Env) *cobra.Command {
	return showing(e, runTemplateShow, &cobra.Command{
		Use: "show KEY", Short: "Show all about a template", Long: "Show all about a template. The beginning of its key is enough.",
		Args: oneName, ValidArgsFunction: firstOnly(e.completeTemplates),
	})
}

func runTemplateShow(ctx context.Context, o showOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Templates.ListTemplates(ctx, &bangerv1.ListTemplatesRequest{})
		if err != nil {
			return err
		}
		v, err := pickTemplate(views(res.GetTemplates(), viewTemplate), o.name)
		if err != nil {
			return err
		}
		return e.print(o.output, v, func() string {
			return fields([]field{
				{"key", v.Key},
				{"problem", v.Problem},
				{"image", v.Image},
				{"kernel", v.Kernel},
				{"vmm", v.VMM},
				{"cpus", fmt.Sprint(v.CPUs)},
				{"memory", size(v.MemoryBytes)},
				{"units", v.Units},
				{"size", size(v.SizeBytes)},
				{"created", e.when(v.CreatedAt)},
				{"last used", e.when(v.LastUsedAt)},
				{"uses", fmt.Sprint(v.Uses)},
				{"directory", v.Directory},
			})
		})
	})
}

// pickTemplate returns the one template whose key begins with prefix.
func pickTemplate(all []templateView, prefix string) (templateView, error) {
	var found []templateView
	for _, v := range all {
		if prefix != "" && strings.HasPrefix(v.Key, prefix) {
			found = append(found, v)
		}
	}
	switch len(found) {
	case 0:
		return templateView{}, fault.New(fault.NotFound, "there is no template %q", prefix).WithHint("see what there is: banger template list")
	case 1:
		return found[0], nil
	}
	return templateView{}, fault.New(fault.Conflict, "%d templates have keys that begin with %s", len(found), prefix).
		WithHint("give more digits: banger template list")
}

func newTemplateDeleteCommand(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "delete KEY...", Aliases: []string{"rm"}, Short: "Delete templates",
		Long: "Delete templates; the beginning of a key is enough. VMs restored from them run on, and what they share of the\n" +
			"memory stays on the disk until the last of them ends.",
		Args: someNames, ValidArgsFunction: e.completeTemplates,
		RunE: func(cmd *cobra.Command, args []string) error { return runTemplateDelete(cmd.Context(), args, e) },
	}
}

func runTemplateDelete(ctx context.Context, keys []string, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		for _, key := range keys {
			if _, err := c.Templates.DeleteTemplate(ctx, &bangerv1.DeleteTemplateRequest{Key: key}); err != nil {
				return err
			}
		}
		return nil
	})
}

type warmOptions struct {
	spec   specOptions
	output outputFormat
}

func newTemplateWarmCommand(e *Env) *cobra.Command {
	var o warmOptions
	cmd := &cobra.Command{
		Use: "warm", Short: "Make the template of a shape now, unless it is there",
		Long: "Make the template that VMs with these flags are restored from, unless it is there. What does not belong to the shape\n" +
			"(the name, keys, NAT, a larger disk) is not looked at.",
		Example: "banger template warm\nbanger template warm --cpus 4 --memory 4G",
		Args:    noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runTemplateWarm(cmd.Context(), o, e) },
	}
	o.spec.addFlags(cmd, e)
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runTemplateWarm(ctx context.Context, o warmOptions, e *Env) error {
	spec, err := o.spec.spec("")
	if err != nil {
		return err
	}
	return e.connected(ctx, bootLimit, func(ctx context.Context, c *client.Client) error {
		d := e.newDisplay()
		made, err := c.WarmTemplate(ctx, &bangerv1.WarmTemplateRequest{Spec: spec}, d.sink(""))
		d.close()
		if err != nil {
			return err
		}
		v := viewTemplate(made)
		return e.print(o.output, v, func() string { return v.Key + "\n" })
	})
}

func (e *Env) completeTemplates(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	return e.completeFrom(func(ctx context.Context, c *client.Client) (keys []string, err error) {
		res, err := c.Templates.ListTemplates(ctx, &bangerv1.ListTemplatesRequest{})
		for _, t := range res.GetTemplates() {
			keys = append(keys, t.GetKey()+"\t"+t.GetImage())
		}
		return keys, err
	})(cmd, args, toComplete)
}
