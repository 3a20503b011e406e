package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

type imageImportOptions struct {
	source, name, choice string
	makeDefault          bool
	output               outputFormat
}

func newImageImportCommand(e *Env) *cobra.Command {
	var o imageImportOptions
	cmd := &cobra.Command{
		Use: "import SOURCE", Short: "Make an image of a tar, a container image or a file system",
		Long: "Make an image of SOURCE, which is one of:\n\n" +
			"  a tar archive of a root file system, also packed (gzip, xz, zstd, bzip2); - reads one from stdin\n" +
			"  a reference to a container image in a registry, like docker.io/library/alpine\n" +
			"  a directory with an OCI layout, or an archive as \"docker save\" writes it\n" +
			"  a file with an ext4 file system\n\n" +
			"It needs no root rights. An image needs neither systemd nor an SSH server: where they are missing, banger's agent\n" +
			"stands for them. Private registries are read with what \"docker login\" left behind.",
		Example: "banger image import docker.io/library/alpine:3.20\nbanger image import rootfs.tar.zst --name web\n" +
			"docker export web | banger image import - --name web",
		Args: oneName, ValidArgsFunction: filesFirst,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.source = args[0]
			return runImageImport(cmd.Context(), o, e)
		},
	}
	cmd.Flags().StringVar(&o.name, "name", "", "name of the new image (default: made of the source and the content)")
	cmd.Flags().StringVar(&o.choice, "select", "", "of several images in one file, the one of this name")
	cmd.Flags().BoolVar(&o.makeDefault, "default", false, "make it the default image")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func filesFirst(_ *cobra.Command, args []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return nil, cobra.ShellCompDirectiveDefault
}

func runImageImport(ctx context.Context, o imageImportOptions, e *Env) error {
	source, remove, err := e.importSource(ctx, o.source)
	if err != nil {
		return err
	}
	defer remove()
	return e.connected(ctx, setupLimit, func(ctx context.Context, c *client.Client) error {
		d := e.newDisplay()
		made, err := c.ImportImage(ctx, &bangerv1.ImportImageRequest{Source: source, Name: o.name, Select: o.choice}, d.sink(""))
		d.close()
		if err != nil {
			return err
		}
		if o.makeDefault {
			if made, err = e.setDefaultImage(ctx, c, made.GetName()); err != nil {
				return err
			}
		}
		e.tellSkipped(made)
		v := viewImage(made)
		return e.print(o.output, v, func() string { return v.Name + "\n" })
	})
}

// maxTold bounds how many of the things left out are told one by one.
const maxTold = 5

func (e *Env) tellSkipped(i *bangerv1.Image) {
	skipped := i.GetSkipped()
	for _, s := range skipped[:min(len(skipped), maxTold)] {
		e.notice("left out: " + s)
	}
	if more := len(skipped) - maxTold; more > 0 {
		e.notice(fmt.Sprintf("left out: %d more; see: banger image show %s", more, i.GetName()))
	}
}

// importSource makes of what was typed what the daemon understands: an absolute path, or a reference as it is. What
// comes on stdin is put into a file first: it is read twice.
func (e *Env) importSource(ctx context.Context, typed string) (source string, remove func(), err error) {
	remove = func() {}
	if typed == "-" {
		return e.spool(ctx)
	}
	if _, err := os.Stat(typed); err == nil {
		source, err = filepath.Abs(typed)
		return source, remove, err
	}
	looksLikeFile := strings.HasPrefix(typed, ".") || strings.HasPrefix(typed, "/") || strings.HasPrefix(typed, "~") || strings.Contains(typed, ".tar")
	if looksLikeFile {
		return "", remove, fault.New(fault.NotFound, "there is no file %s", typed)
	}
	return typed, remove, nil
}

func (e *Env) spool(ctx context.Context) (path string, remove func(), err error) {
	if isTerminal(e.Stdin) {
		return "", func() {}, fault.New(fault.Usage, "an archive is expected on stdin, and that is a terminal").
			WithHint("for instance: docker export NAME | banger image import -")
	}
	if err := os.MkdirAll(e.Paths.Cache, 0o700); err != nil {
		return "", func() {}, fault.Wrap(fault.Precondition, err, "cannot make directory %s", e.Paths.Cache)
	}
	dir, err := os.MkdirTemp(e.Paths.Cache, "import-")
	if err != nil {
		return "", func() {}, fault.Wrap(fault.Precondition, err, "cannot keep what comes on stdin")
	}
	remove = func() { _ = os.RemoveAll(dir) } // it lies in the cache
	path = filepath.Join(dir, "stdin.tar")
	written := make(chan error, 1)
	go func() { written <- writeAll(path, e.Stdin) }() // a read that waits ends with the process, and by nothing else
	select {
	case err = <-written:
	case <-ctx.Done():
		remove()
		return "", func() {}, ctx.Err()
	}
	if err != nil {
		remove()
		return "", func() {}, fault.Wrap(fault.Precondition, err, "cannot keep what comes on stdin").WithHint("free some space in %s", e.Paths.Cache)
	}
	if info, err := os.Stat(path); err == nil && info.Size() == 0 {
		remove()
		return "", func() {}, fault.New(fault.Usage, "nothing came on stdin").WithHint("see whether the program before the pipe failed")
	}
	return path, remove, nil
}

func writeAll(path string, r io.Reader) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = io.Copy(f, r)
	return errors.Join(err, f.Close())
}

func newImageDefaultCommand(e *Env) *cobra.Command {
	return showing(e, runImageDefault, &cobra.Command{
		Use: "default [NAME]", Short: "Show or choose the image of VMs that name none",
		Args: optionalName, ValidArgsFunction: firstOnly(e.completeImages),
	})
}

// setDefaultImage makes an image the default, and tells when the configuration has another opinion.
func (e *Env) setDefaultImage(ctx context.Context, c *client.Client, name string) (*bangerv1.Image, error) {
	res, err := c.Images.SetDefaultImage(ctx, &bangerv1.SetDefaultImageRequest{Name: name})
	if err == nil && res.GetNotice() != "" {
		e.notice(res.GetNotice())
	}
	return res.GetImage(), err
}

func runImageDefault(ctx context.Context, o showOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		var i *bangerv1.Image
		if o.name == "" {
			res, err := c.Images.GetImage(ctx, &bangerv1.GetImageRequest{})
			if err != nil {
				return err
			}
			i = res.GetImage()
			e.tellDefault("image", i.GetDefaultFrom())
		} else {
			var err error
			if i, err = e.setDefaultImage(ctx, c, o.name); err != nil {
				return err
			}
		}
		v := viewImage(i)
		return e.print(o.output, v, func() string { return v.Name + "\n" })
	})
}

type deleteOptions struct {
	names []string
	yes   bool
}

func newImageDeleteCommand(e *Env) *cobra.Command {
	return newDeleteCommand(e, "image", e.completeImages, func(ctx context.Context, c *client.Client, name string) error {
		_, err := c.Images.DeleteImage(ctx, &bangerv1.DeleteImageRequest{Name: name})
		return err
	})
}

func newKernelDeleteCommand(e *Env) *cobra.Command {
	return newDeleteCommand(e, "kernel", e.completeKernels, func(ctx context.Context, c *client.Client, name string) error {
		_, err := c.Images.DeleteKernel(ctx, &bangerv1.DeleteKernelRequest{Name: name})
		return err
	})
}

// newDeleteCommand is the command that deletes images or kernels.
func newDeleteCommand(e *Env, what string, complete completer, remove func(context.Context, *client.Client, string) error) *cobra.Command {
	var o deleteOptions
	cmd := &cobra.Command{
		Use: "delete NAME...", Aliases: []string{"rm"}, Short: "Delete " + what + "s that no VM uses",
		Args: someNames, ValidArgsFunction: complete,
		RunE: func(cmd *cobra.Command, args []string) error {
			o.names = args
			if !o.yes && e.isAsked() {
				if err := e.confirm(fmt.Sprintf("Delete %s %s?", what, strings.Join(args, ", ")), "nothing was deleted"); err != nil {
					return err
				}
			}
			return e.quickly(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				return deleteAll(ctx, c, o.names, remove)
			})
		},
	}
	cmd.Flags().BoolVarP(&o.yes, "yes", "y", false, "do not ask")
	return cmd
}

// deleteAll goes on behind a failure, and returns all of them.
func deleteAll(ctx context.Context, c *client.Client, names []string, remove func(context.Context, *client.Client, string) error) error {
	var failures severalErrors
	for _, name := range names {
		if err := remove(ctx, c, name); err != nil {
			failures = append(failures, err)
		}
	}
	if len(failures) == 0 {
		return nil
	}
	return failures
}

func newImageRenameCommand(e *Env) *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use: "rename NAME NEW", Short: "Give an image another name", Long: "Give an image another name. No VM may use it: VMs know their image by its name.",
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) == 1 {
				return usage(cmd, "the new name is missing")
			}
			return nameAndNew(cmd, args)
		},
		ValidArgsFunction: firstOnly(e.completeImages),
		RunE: func(cmd *cobra.Command, args []string) error {
			return e.quickly(cmd.Context(), func(ctx context.Context, c *client.Client) error {
				res, err := c.Images.RenameImage(ctx, &bangerv1.RenameImageRequest{Name: args[0], NewName: args[1]})
				if err != nil {
					return err
				}
				v := viewImage(res.GetImage())
				return e.print(output, v, func() string { return v.Name + "\n" })
			})
		},
	}
	addOutputFlag(cmd, &output)
	return cmd
}
