package cli

import (
	"context"

	"charm.land/fang/v2"
	"github.com/spf13/cobra"

	"banger/internal/fault"
)

const longHelp = `banger keeps persistent Linux micro-VMs on your own machine: create one and work in it
with "banger run", leave, come back with "banger vm ssh".

Exit codes: 0 ok, 1 unexpected (a bug), 2 usage, 3 not found, 4 conflict or wrong state,
5 something needed is missing or damaged (see "banger doctor"), 6 timeout, 130 interrupted.
"vm ssh", "vm exec" and "run" pass the guest command's own code through.`

func newRoot(e *Env) *cobra.Command {
	root := group("banger", "Persistent Linux micro-VMs on your own machine")
	root.Long = longHelp
	root.SilenceErrors, root.SilenceUsage = true, true
	root.CompletionOptions.DisableDefaultCmd = true
	root.SetFlagErrorFunc(flagError)
	root.SetHelpFunc(help)
	root.SetHelpCommand(newHelpCommand(root))
	flags := root.PersistentFlags()
	flags.BoolVarP(&e.quiet, "quiet", "q", false, "no progress and no notices on stderr")
	flags.DurationVar(&e.timeout, "timeout", 0, "give up after this long, for instance 90s")
	flags.Lookup("timeout").DefValue = "" // each command has its own
	root.PersistentPreRunE = func(*cobra.Command, []string) error {
		if e.timeout < 0 {
			return fault.New(fault.Usage, "--timeout %s is negative", e.timeout)
		}
		return nil
	}
	root.AddCommand(
		newRunCommand(e), newSetupCommand(e), newVMCommand(e), newImageCommand(e), newKernelCommand(e),
		newTemplateCommand(e), newRuntimeCommand(e), newDNSCommand(e), newSSHConfigCommand(e),
		newDaemonCommand(e), newDoctorCommand(e), newVersionCommand(e), newCompletionCommand(e), newInternalCommand(e),
	)
	return root
}

// group is a command that only holds others: without a word it shows its help, an unknown word is
// a usage fault.
func group(use, short string, children ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{
		Use: use, Short: short,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				return unknownCommand(cmd, args[0])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(children...)
	return cmd
}

// help renders with fang. Fang offers its help only as a part of its Execute, which would also
// print errors its own way, so a command of no effect is given to it and its help taken from there.
func help(cmd *cobra.Command, args []string) {
	blank := &cobra.Command{Use: "banger", Run: func(*cobra.Command, []string) {}}
	blank.SetArgs([]string{})
	err := fang.Execute(context.Background(), blank, fang.WithoutManpage(), fang.WithoutVersion(), fang.WithoutCompletions())
	if err != nil {
		cmd.Println(cmd.UsageString())
		return
	}
	blank.HelpFunc()(cmd, args)
}

func newHelpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use: "help [COMMAND]", Short: "Help about any command",
		ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(_ *cobra.Command, args []string) error {
			cmd, rest, err := root.Find(args)
			if err != nil || len(rest) > 0 {
				return unknownCommand(cmd, rest[len(rest)-1])
			}
			return cmd.Help()
		},
	}
}

func newInternalCommand(e *Env) *cobra.Command {
	cmd := group("internal", "Helpers of banger's own; they promise nothing", newExitCodesCommand(), newProxyCommand(e),
		newInternalNATCommand(e), newInternalCleanCommand(e))
	cmd.Hidden = true
	return cmd
}

func newVMCommand(e *Env) *cobra.Command {
	return group(
		"vm", "Virtual machines: create, start, enter, delete",
		newVMCreateCommand(e), newVMListCommand(e), newVMShowCommand(e),
		newVMStartCommand(e), newVMStopCommand(e), newVMSuspendCommand(e), newVMResumeCommand(e),
		newVMSetCommand(e), newVMForkCommand(e), newVMCloneCommand(e), newVMSnapshotCommand(e),
		newVMKillCommand(e), newVMRestartCommand(e), newVMDeleteCommand(e),
		newVMSSHCommand(e), newVMExecCommand(e), newVMLogsCommand(e), newVMEventsCommand(e), newVMPingCommand(e),
		newVMPortsCommand(e),
	)
}

func newImageCommand(e *Env) *cobra.Command {
	return group(
		"image", "Images: the root file systems VMs share",
		newImageListCommand(e), newImageShowCommand(e),
		newImageBuildCommand(e), newImageTestCommand(e), newImageRecipesCommand(e),
		newImageImportCommand(e), newImageDefaultCommand(e), newImageRenameCommand(e), newImageDeleteCommand(e),
	)
}

func newKernelCommand(e *Env) *cobra.Command {
	return group(
		"kernel", "Kernels VMs boot",
		newKernelListCommand(e), newKernelShowCommand(e), newKernelCheckCommand(e),
		newKernelImportCommand(e), newKernelDefaultCommand(e), newKernelDeleteCommand(e),
	)
}
