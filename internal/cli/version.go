package cli

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"banger/internal/build"
)

func newVersionCommand(e *Env) *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use: "version", Short: "Tell which build of banger this is, and which one the daemon is",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runVersion(cmd.Context(), output, e) },
	}
	addOutputFlag(cmd, &output)
	return cmd
}

// runVersion works without a daemon; one that runs is asked.
func runVersion(ctx context.Context, output outputFormat, e *Env) error {
	v := versionView{Build: build.ID(), Go: runtime.Version(), OS: runtime.GOOS, Architecture: runtime.GOARCH}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if c, err := e.Dial(ctx, false); err == nil {
		v.DaemonBuild = c.Hello.Build
		c.Close()
	}
	return e.print(output, v, func() string {
		text := fmt.Sprintf("banger %s (%s, %s/%s)\n", v.Build, v.Go, v.OS, v.Architecture)
		switch v.DaemonBuild {
		case "":
			return text + "daemon: not running\n"
		case v.Build:
			return text + "daemon: the same\n"
		}
		return text + "daemon: " + v.DaemonBuild + "\n"
	})
}
