package cli

import (
	"context"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
)

type createOptions struct {
	name    string
	noStart bool
	output  outputFormat
	spec    specOptions
}

func newVMCreateCommand(e *Env) *cobra.Command {
	var o createOptions
	cmd := &cobra.Command{
		Use: "create [NAME]", Short: "Create a VM and start it",
		Long: "Create a VM and start it. Without a name one is made up; the name is printed in the end.",
		Example: "banger vm create web\nbanger vm create build --cpus 4 --memory 4G --work-disk 20G\n" +
			"banger vm create box --image docker.io/library/alpine",
		Args: optionalName, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.name = args[0]
			}
			return runVMCreate(cmd.Context(), o, e)
		},
	}
	o.spec.addFlags(cmd, e)
	cmd.Flags().BoolVar(&o.noStart, "no-start", false, "only create it")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runVMCreate(ctx context.Context, o createOptions, e *Env) error {
	spec, err := o.spec.spec(o.name)
	if err != nil {
		return err
	}
	return e.connected(ctx, bootLimit, func(ctx context.Context, c *client.Client) error {
		created, err := e.create(ctx, c, &bangerv1.CreateVMRequest{Spec: spec, NoStart: o.noStart})
		if err != nil {
			return err
		}
		return e.print(o.output, viewVM(created), func() string { return created.GetName() + "\n" })
	})
}

// create creates a VM with its progress on stderr. A request without a name gets one that is free.
func (e *Env) create(ctx context.Context, c *client.Client, req *bangerv1.CreateVMRequest) (*bangerv1.VM, error) {
	d := e.newDisplay()
	defer d.close()
	if isReference(req.GetSpec().GetImage()) {
		i, err := c.ImportImage(ctx, &bangerv1.ImportImageRequest{Source: req.GetSpec().GetImage(), Present: true}, d.sink(""))
		if err != nil {
			return nil, err
		}
		req.Spec.Image = i.GetName()
	}
	invent := req.GetSpec().GetName() == ""
	for attempt := 1; ; attempt++ {
		if invent {
			req.Spec.Name = inventName()
		}
		created, err := c.Create(ctx, req, d.sink(""))
		if invent && fault.KindOf(err) == fault.Conflict && attempt < nameAttempts {
			continue
		}
		return created, err
	}
}

// isReference tells a reference to an image in a registry from the name of an image: no name has these characters.
func isReference(image string) bool {
	return strings.ContainsAny(image, "/:@") && !strings.HasPrefix(image, ".") && !strings.HasPrefix(image, "/")
}
