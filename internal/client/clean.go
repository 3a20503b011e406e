package client

import (
	"context"
	"io"

	"banger/internal/system"
)

// Clean lets bangerd take away what it made in the host's network, says on stdout what that was, and returns its exit
// code. A daemon that runs is a conflict, which bangerd tells on stderr.
func Clean(ctx context.Context, o Options, stdout io.Writer) (int, error) {
	command, err := o.command()
	if err != nil {
		return 0, err
	}
	args := append(command[1:len(command):len(command)], "clean")
	return system.Foreground(ctx, system.Command{Path: command[0], Args: args, Env: o.Env, Stdout: stdout})
}
