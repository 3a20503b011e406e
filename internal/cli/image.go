package cli

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
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
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
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
			v.Name, defaultMark(v.DefaultFrom), size(v.SizeBytes), fmt.Sprint(v.PackageCount),
			fmt.Sprint(len(v.UsedBy)), e.age(v.CreatedAt), problemMark(v.Problem),
		}
		problems[i] = v.Problem
	}
	text := e.table(columns, rows) + inFull(problems)
	for _, v := range images {
		if v.Notice != "" {
			text += "notice: image " + v.Name + ": " + fault.Printable(v.Notice) + "\n"
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
			text += "problem: " + fault.Printable(p) + "\n"
		}
	}
	return text
}

// defaultMark renders what makes an image or a kernel the default, in a table: "yes" is the catalogue, "config.toml:3" a line of
// the configuration, which wins.
func defaultMark(from string) string {
	switch {
	case from == "":
		return "-"
	case filepath.IsAbs(from):
		return filepath.Base(from)
	}
	return "yes"
}

// defaultText is the same where there is room.
func defaultText(from string) string {
	if filepath.IsAbs(from) {
		return "yes, by " + from
	}
	return yesNo(from != "")
}

// tellDefault says why the default is the one that it is, when that is not the catalogue's.
func (e *Env) tellDefault(what, from string) {
	if filepath.IsAbs(from) {
		e.notice(from + " names the default " + what)
	}
}

func newImageShowCommand(e *Env) *cobra.Command {
	return showing(e, runImageShow, &cobra.Command{
		Use: "show NAME", Short: "Show all about an image",
		Args: oneName, ValidArgsFunction: firstOnly(e.completeImages),
	})
}

func runImageShow(ctx context.Context, o showOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
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
				{"default", defaultText(v.DefaultFrom)},
				{"used by", dash(strings.Join(v.UsedBy, ", "))},
				{"digest", v.Digest},
				{"directory", v.Directory},
			}...))
		})
	})
}
