package cli

import (
	"context"
	"fmt"
	"runtime"
	"time"

	"github.com/spf13/cobra"

	"banger/internal/build"
)

// versionPatience is how long the daemon may take to say which build it is.
const versionPatience = 3 * time.Second

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
	ctx, cancel := context.WithTimeout(ctx, versionPatience)
	defer cancel()
	if listens(ctx, e.Paths.Socket()) {
		c, err := e.Dial(ctx, false)
		if err == nil {
			v.DaemonBuild = c.Hello.Build
			c.Close()
		} else {
			v.DaemonProblem = err.Error()
		}
	}
	return e.print(output, v, func() string {
		daemon := v.DaemonBuild
		switch {
		case v.DaemonProblem != "":
			daemon = v.DaemonProblem
		case daemon == "":
			daemon = "not running"
		case daemon == v.Build:
			daemon = "the same"
		}
		return fmt.Sprintf("banger %s (%s, %s/%s)\ndaemon: %s\n", v.Build, v.Go, v.OS, v.Architecture, daemon)
	})
}
