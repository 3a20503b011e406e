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

func newKernelShowCommand(e *Env) *cobra.Command {
	return showing(e, runKernelShow, &cobra.Command{
		Use: "show NAME", Short: "Show all about a kernel",
		Args: oneName, ValidArgsFunction: firstOnly(e.completeKernels),
	})
}

func runKernelShow(ctx context.Context, o showOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Images.GetKernel(ctx, &bangerv1.GetKernelRequest{Name: o.name})
		if err != nil {
			return err
		}
		v := viewKernel(res.GetKernel())
		return e.print(o.output, v, func() string {
			return fields([]field{
				{"name", v.Name},
				{"release", v.Release},
				{"problem", v.Problem},
				{"architecture", v.Architecture},
				{"version", v.Version},
				{"source", v.Source},
				{"formats", strings.Join(v.Formats, ", ")},
				{"size", size(v.SizeBytes)},
				{"created", e.when(v.CreatedAt)},
				{"default", defaultText(v.DefaultFrom)},
				{"used by", dash(strings.Join(v.UsedBy, ", "))},
				{"directory", v.Directory},
			})
		})
	})
}

type kernelImportOptions struct {
	source, release, modules, config, name string
	host, makeDefault                      bool
	output                                 outputFormat
}

func newKernelImportCommand(e *Env) *cobra.Command {
	var o kernelImportOptions
	cmd := &cobra.Command{
		Use: "import FILE", Short: "Make a kernel of a package, of a file, or of the host's own",
		Long: "Make a kernel of FILE, which is a Debian package (linux-image-*.deb), or a kernel: a bzImage (packed with gzip, xz,\n" +
			"lz4 or zstd) or an ELF vmlinux on amd64, an Image on arm64. With --host, of this host's own kernel in /boot and\n" +
			"/lib/modules. A kernel file without modules must have built in what VMs need.",
		Example: "banger kernel import linux-image-6.12.0-amd64.deb\nbanger kernel import --host\n" +
			"banger kernel import bzImage --modules /lib/modules/6.12.0 --config .config",
		Args: optionalName, ValidArgsFunction: filesFirst,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.source = args[0]
			}
			return runKernelImport(cmd, o, e)
		},
	}
	f := cmd.Flags()
	f.BoolVar(&o.host, "host", false, "take this host's own kernel")
	f.StringVar(&o.release, "release", "", "which of the host's kernels, as uname -r says (default: the one that runs)")
	f.StringVar(&o.modules, "modules", "", "directory of the kernel's modules, .../lib/modules/RELEASE")
	f.StringVar(&o.config, "config", "", "file with the kernel's configuration")
	f.StringVar(&o.name, "name", "", "name of the new kernel (default: its release)")
	f.BoolVar(&o.makeDefault, "default", false, "make it the default kernel")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runKernelImport(cmd *cobra.Command, o kernelImportOptions, e *Env) error {
	o.host = o.host || o.release != ""
	switch {
	case o.source == "" && !o.host:
		return usage(cmd, "a file is missing, or --host")
	case o.source != "" && o.host:
		return usage(cmd, "a file and the host's own kernel do not go together")
	}
	req := &bangerv1.ImportKernelRequest{Release: o.release, Name: o.name}
	for _, path := range []struct {
		typed string
		to    *string
	}{{o.source, &req.Source}, {o.modules, &req.ModulesDirectory}, {o.config, &req.ConfigFile}} {
		if path.typed == "" {
			continue
		}
		var err error
		if *path.to, err = filepath.Abs(path.typed); err != nil {
			return err
		}
	}
	return e.connected(cmd.Context(), saveLimit, func(ctx context.Context, c *client.Client) error {
		d := e.newDisplay()
		made, err := c.ImportKernel(ctx, req, d.sink(""))
		d.close()
		if err != nil {
			return err
		}
		if o.makeDefault {
			if made, err = e.setDefaultKernel(ctx, c, made.GetName()); err != nil {
				return err
			}
		}
		v := viewKernel(made)
		return e.print(o.output, v, func() string { return v.Name + "\n" })
	})
}

func newKernelDefaultCommand(e *Env) *cobra.Command {
	return showing(e, runKernelDefault, &cobra.Command{
		Use: "default [NAME]", Short: "Show or choose the kernel of VMs that name none",
		Args: optionalName, ValidArgsFunction: firstOnly(e.completeKernels),
	})
}

// setDefaultKernel makes a kernel the default, and tells when the configuration has another opinion.
func (e *Env) setDefaultKernel(ctx context.Context, c *client.Client, name string) (*bangerv1.Kernel, error) {
	res, err := c.Images.SetDefaultKernel(ctx, &bangerv1.SetDefaultKernelRequest{Name: name})
	if err == nil && res.GetNotice() != "" {
		e.notice(res.GetNotice())
	}
	return res.GetKernel(), err
}

func runKernelDefault(ctx context.Context, o showOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		var k *bangerv1.Kernel
		if o.name == "" {
			res, err := c.Images.GetKernel(ctx, &bangerv1.GetKernelRequest{})
			if err != nil {
				return err
			}
			k = res.GetKernel()
			e.tellDefault("kernel", k.GetDefaultFrom())
		} else {
			var err error
			if k, err = e.setDefaultKernel(ctx, c, o.name); err != nil {
				return err
			}
		}
		v := viewKernel(k)
		return e.print(o.output, v, func() string { return v.Name + "\n" })
	})
}

type optionView struct {
	Name     string `json:"name"`
	Value    string `json:"value"`
	OK       bool   `json:"ok"`
	Required bool   `json:"required"`
	Purpose  string `json:"purpose"`
}

type kernelCheckView struct {
	Kernel  kernelView   `json:"kernel"`
	OK      bool         `json:"ok"` // nothing that banger itself needs is off
	Options []optionView `json:"options"`
}

func newKernelCheckCommand(e *Env) *cobra.Command {
	return showing(e, runKernelCheck, &cobra.Command{
		Use: "check [NAME]", Short: "Tell which options that banger or Docker needs are off in a kernel",
		Args: optionalName, ValidArgsFunction: firstOnly(e.completeKernels),
	})
}

func runKernelCheck(ctx context.Context, o showOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Images.CheckKernel(ctx, &bangerv1.CheckKernelRequest{Name: o.name})
		if err != nil {
			return err
		}
		v := kernelCheckView{Kernel: viewKernel(res.GetKernel()), OK: true}
		for _, p := range res.GetOptions() {
			v.Options = append(v.Options, optionView{p.GetName(), p.GetValue(), p.GetOk(), p.GetRequired(), p.GetPurpose()})
			v.OK = v.OK && (p.GetOk() || !p.GetRequired())
		}
		if err := e.print(o.output, v, func() string { return e.checkedTable(v) }); err != nil {
			return err
		}
		if !v.OK {
			return fault.New(fault.Precondition, "kernel %s lacks what banger needs", v.Kernel.Name).
				WithHint("choose another one: banger kernel list")
		}
		return nil
	})
}

// checkedTable shows what is off, and counts the rest.
func (e *Env) checkedTable(v kernelCheckView) string {
	columns := []column{{title: "OPTION"}, {title: "VALUE"}, {title: "NEEDED"}, {title: "FOR", flexible: true}}
	var rows [][]string
	for _, o := range v.Options {
		if o.OK {
			continue
		}
		needed := "for that"
		if o.Required {
			needed = "always"
		}
		rows = append(rows, []string{"CONFIG_" + o.Name, o.Value, needed, o.Purpose})
	}
	summary := fmt.Sprintf("kernel %s: %d of %d options are on\n", v.Kernel.Name, len(v.Options)-len(rows), len(v.Options))
	if len(rows) == 0 {
		return summary
	}
	return summary + e.table(columns, rows)
}
