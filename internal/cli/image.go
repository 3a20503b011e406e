package cli

import (
	"context"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
)

func newImageListCommand(e *Env) *cobra.Command {
	var o listOptions
	cmd := &cobra.Command{
		Use: "list", Aliases: []string{"ls"}, Short: "List images",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runImageList(cmd.Context(), o, e) },
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runImageList(ctx context.Context, o listOptions, e *Env) error {
	return e.within(ctx, quickLimit, func(ctx context.Context) error {
		c, err := e.connect(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		res, err := c.Images.ListImages(ctx, &bangerv1.ListImagesRequest{})
		if err != nil {
			return err
		}
		images := views(res.GetImages(), viewImage)
		return e.print(o.output, images, func() string { return e.imageTable(images) })
	})
}

func (e *Env) imageTable(images []imageView) string {
	columns := []column{
		{title: "NAME", flexible: true},
		{title: "DEFAULT"},
		{title: "SIZE", right: true},
		{title: "PACKAGES", right: true},
		{title: "VMS", right: true},
		{title: "CREATED"},
		{title: "PROBLEM"},
	}
	rows, problems := make([][]string, len(images)), make([]string, len(images))
	for i, v := range images {
		rows[i] = []string{
			v.Name, defaultMark(v.IsDefault), size(v.SizeBytes), fmt.Sprint(v.PackageCount),
			fmt.Sprint(len(v.UsedBy)), e.age(v.CreatedAt), problemMark(v.Problem),
		}
		problems[i] = v.Problem
	}
	text := e.table(columns, rows) + inFull(problems)
	for _, v := range images {
		if v.Notice != "" {
			text += "notice: image " + v.Name + ": " + printable(v.Notice) + "\n"
		}
	}
	return text
}

func problemMark(problem string) string {
	if problem == "" {
		return "-"
	}
	return "yes"
}

// inFull renders problems below their table, a line each. Nothing of them is cut: they name files and the way out.
func inFull(problems []string) string {
	text := ""
	for _, p := range problems {
		if p != "" {
			text += "problem: " + printable(p) + "\n"
		}
	}
	return text
}

func defaultMark(isDefault bool) string {
	if isDefault {
		return "yes"
	}
	return "-"
}

func newImageShowCommand(e *Env) *cobra.Command {
	var o showOptions
	cmd := &cobra.Command{
		Use: "show NAME", Short: "Show all about an image",
		Args: oneName, ValidArgsFunction: firstOnly(e.completeImages),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name = args[0]
			return runImageShow(cmd.Context(), o, e)
		},
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runImageShow(ctx context.Context, o showOptions, e *Env) error {
	return e.within(ctx, quickLimit, func(ctx context.Context) error {
		c, err := e.connect(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		res, err := c.Images.GetImage(ctx, &bangerv1.GetImageRequest{Name: o.name})
		if err != nil {
			return err
		}
		v := viewImage(res.GetImage())
		return e.print(o.output, v, func() string {
			return fields(append(append([]field{
				{"name", v.Name},
				{"description", v.Description},
				{"problem", v.Problem},
				{"notice", v.Notice},
				{"source", v.Source},
				{"also called", strings.Join(v.Aliases, ", ")},
				{"left out", strings.Join(v.Skipped, "; ")},
			}, v.Build.fields()...), []field{
				{"architecture", v.Architecture},
				{"size", size(v.SizeBytes)},
				{"work seed", size(v.WorkSeedBytes)},
				{"packages", fmt.Sprint(v.PackageCount)},
				{"created", e.when(v.CreatedAt)},
				{"default", yesNo(v.IsDefault)},
				{"used by", dash(strings.Join(v.UsedBy, ", "))},
				{"digest", v.Digest},
				{"directory", v.Directory},
			}...))
		})
	})
}
