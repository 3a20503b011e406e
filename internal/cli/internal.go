package cli

import (
	"fmt"

	"github.com/spf13/cobra"

	"banger/internal/fault"
)

func newExitCodesCommand() *cobra.Command {
	return &cobra.Command{
		Use: "exit-codes", Short: "Print the table of exit codes", Args: noArguments,
		RunE: func(cmd *cobra.Command, _ []string) error {
			for _, k := range exitKinds {
				fmt.Fprintf(cmd.OutOrStdout(), "%d %s\n", int(k), k)
			}
			return nil
		},
	}
}

var exitKinds = []fault.Kind{
	fault.Unexpected, fault.Usage, fault.NotFound, fault.Conflict, fault.Precondition, fault.Timeout, fault.Interrupted,
}
