package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"banger/internal/build"
	"banger/internal/bundle"
	"banger/internal/fault"
	"banger/internal/supply"
)

type runtimeInstallOptions struct {
	firecracker supply.FirecrackerOptions
	output      outputFormat
}

type runtimeInstallView struct {
	Program string `json:"program"`
	Version string `json:"version"`
	Path    string `json:"path"`
}

func newRuntimeInstallCommand(e *Env) *cobra.Command {
	var o runtimeInstallOptions
	cmd := &cobra.Command{
		Use: "install firecracker", Short: "Put Firecracker from its official release into the runtime directory",
		Long: "Put Firecracker and its jailer into the runtime directory, from the archive of an official release and its published\n" +
			"checksum. On a machine without the internet, carry over firecracker-vX.Y.Z-ARCH.tgz and its .sha256.txt, and give the\n" +
			"archive with --from. Running VMs keep the one they run on.",
		Example: "banger runtime install firecracker\nbanger runtime install firecracker --from ~/Downloads/firecracker-v" + supply.FirecrackerVersion + "-x86_64.tgz",
		Args: func(cmd *cobra.Command, args []string) error {
			if err := oneName(cmd, args); err != nil {
				return err
			}
			if args[0] != "firecracker" {
				return fault.New(fault.Usage, "cannot install %q", args[0]).WithHint("banger runtime install firecracker")
			}
			return nil
		},
		ValidArgsFunction: firstOnly(fixedCompletions("firecracker")),
		RunE:              func(cmd *cobra.Command, _ []string) error { return runRuntimeInstall(cmd.Context(), o, e) },
	}
	flags := cmd.Flags()
	flags.StringVar(&o.firecracker.Version, "version", "", "version to install (default: "+supply.FirecrackerVersion+", or the one of --from)")
	flags.StringVar(&o.firecracker.From, "from", "", "archive of a release that is here already")
	flags.StringVar(&o.firecracker.SHA256, "sha256", "", "checksum of the archive (default: the one published beside it)")
	flags.StringVar(&o.firecracker.BaseURL, "url", "", "where the releases lie (default: Firecracker's own place)")
	addOutputFlag(cmd, &o.output)
	return cmd
}

func runRuntimeInstall(ctx context.Context, o runtimeInstallOptions, e *Env) error {
	return e.changeRuntime(ctx, saveLimit, func(ctx context.Context, _ bundle.Place, store *supply.Store) error {
		b, version, err := store.InstallFirecracker(ctx, o.firecracker)
		if err != nil {
			return err
		}
		v := runtimeInstallView{Program: "firecracker", Version: version, Path: b.Path(b.Manifest.VMMs["firecracker"])}
		return e.print(o.output, v, func() string { return fmt.Sprintf("Firecracker %s is installed: %s\n", v.Version, v.Path) })
	})
}

// shortVersion is the release of this build.
func shortVersion() string { return build.Version }
