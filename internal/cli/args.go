package cli

import (
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"banger/internal/fault"
)

// Argument checks that yield usage faults; cobra's own speak of "arg(s)".

func noArguments(cmd *cobra.Command, args []string) error {
	if len(args) > 0 {
		return usage(cmd, "unexpected argument %q", args[0])
	}
	return nil
}

func oneName(cmd *cobra.Command, args []string) error {
	switch {
	case len(args) == 0:
		return missing(cmd)
	case len(args) > 1:
		return usage(cmd, "unexpected argument %q", args[1])
	}
	return noneEmpty(cmd, args)
}

// nameAndNew wants a name, and perhaps that of what is made of it.
func nameAndNew(cmd *cobra.Command, args []string) error {
	if len(args) > 2 {
		return usage(cmd, "unexpected argument %q", args[2])
	}
	return someNames(cmd, args)
}

func optionalName(cmd *cobra.Command, args []string) error {
	if len(args) > 1 {
		return usage(cmd, "unexpected argument %q", args[1])
	}
	return noneEmpty(cmd, args)
}

// nameAndTag wants a VM and the tag of a snapshot, which may be left out unless it is needed.
func nameAndTag(needed bool) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		switch {
		case len(args) == 0:
			return missing(cmd)
		case needed && len(args) == 1:
			return usage(cmd, "the tag of a snapshot of %s is missing", args[0])
		case len(args) > 2:
			return usage(cmd, "unexpected argument %q", args[2])
		}
		return nil
	}
}

func nameAndTags(cmd *cobra.Command, args []string) error {
	if len(args) > 1 {
		return nil
	}
	return nameAndTag(true)(cmd, args)
}

func someNames(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return missing(cmd)
	}
	return noneEmpty(cmd, args)
}

// nameAndCommand wants a name first; what follows is the guest's command.
func nameAndCommand(cmd *cobra.Command, args []string) error {
	if len(args) == 0 || cmd.ArgsLenAtDash() == 0 {
		return missing(cmd)
	}
	return noneEmpty(cmd, args[:1])
}

// optionalNameAndCommand wants at most one word before "--".
func optionalNameAndCommand(cmd *cobra.Command, args []string) error {
	before := cmd.ArgsLenAtDash()
	if before < 0 {
		before = len(args)
	}
	if before > 1 {
		f := fault.New(fault.Usage, "unexpected argument %q", args[1])
		return f.WithHint("put -- before the command that runs in the guest")
	}
	return noneEmpty(cmd, args[:before])
}

// missing tells which argument a command lacks, by the word for it in its usage line.
func missing(cmd *cobra.Command) error {
	what := "name"
	if words := strings.Fields(cmd.Use); len(words) > 1 && words[1] == strings.ToUpper(words[1]) {
		what = strings.ToLower(strings.Trim(words[1], "[]."))
	}
	return usage(cmd, "a %s is missing", what)
}

// noneEmpty refuses an empty word where a name belongs: a script's unset variable is no wish.
func noneEmpty(cmd *cobra.Command, names []string) error {
	if slices.Contains(names, "") {
		return usage(cmd, "a name is empty")
	}
	return nil
}

func usage(cmd *cobra.Command, format string, a ...any) error {
	return fault.New(fault.Usage, format, a...).WithHint("see %q", cmd.CommandPath()+" --help")
}
