package cli

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
)

type completer = func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective)

// completionLimit bounds what a press of the tab key may cost.
const completionLimit = 500 * time.Millisecond

func newCompletionCommand(e *Env) *cobra.Command {
	script := func(shell, load string, write func(root *cobra.Command) error) *cobra.Command {
		return &cobra.Command{
			Use: shell, Short: "Completion for " + shell, Long: "Completion for " + shell + ". To load it now and in every new shell:\n\n" + load,
			Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
			RunE: func(cmd *cobra.Command, _ []string) error { return write(cmd.Root()) },
		}
	}
	return group(
		"completion", "Print the script that completes banger's commands in your shell",
		script("bash", "mkdir -p ~/.local/share/bash-completion/completions\n"+
			"banger completion bash > ~/.local/share/bash-completion/completions/banger\n\nIt needs the package bash-completion.",
			func(root *cobra.Command) error { return root.GenBashCompletionV2(e.Stdout, true) }),
		script("zsh", `banger completion zsh > "${fpath[1]}/_banger"`,
			func(root *cobra.Command) error { return root.GenZshCompletion(e.Stdout) }),
		script("fish", "mkdir -p ~/.config/fish/completions\nbanger completion fish > ~/.config/fish/completions/banger.fish",
			func(root *cobra.Command) error { return root.GenFishCompletion(e.Stdout, true) }),
	)
}

func fixedCompletions(values ...string) completer {
	return func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return values, cobra.ShellCompDirectiveNoFileComp
	}
}

// firstOnly completes the first argument and nothing after it.
func firstOnly(complete completer) completer {
	return func(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		if len(args) > 0 {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		return complete(cmd, args, toComplete)
	}
}

// completeVMs completes names of VMs whose state fits, leaving out those already named.
func (e *Env) completeVMs(fits func(state string) bool) completer {
	return e.completeFrom(func(ctx context.Context, c *client.Client) (names []string, err error) {
		res, err := c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{})
		for _, v := range res.GetVms() {
			if fits(v.GetState()) {
				names = append(names, v.GetName()+"\t"+v.GetState())
			}
		}
		return names, err
	})
}

func (e *Env) completeOneVM(fits func(state string) bool) completer {
	return firstOnly(e.completeVMs(fits))
}

func (e *Env) completeImages(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	return e.completeFrom(func(ctx context.Context, c *client.Client) (names []string, err error) {
		res, err := c.Images.ListImages(ctx, &bangerv1.ListImagesRequest{})
		for _, i := range res.GetImages() {
			names = append(names, i.GetName())
		}
		return names, err
	})(cmd, args, toComplete)
}

func (e *Env) completeKernels(cmd *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
	return e.completeFrom(func(ctx context.Context, c *client.Client) (names []string, err error) {
		res, err := c.Images.ListKernels(ctx, &bangerv1.ListKernelsRequest{})
		for _, k := range res.GetKernels() {
			names = append(names, k.GetName())
		}
		return names, err
	})(cmd, args, toComplete)
}

// completeFrom asks a daemon that runs; none is started for a press of the tab key. The part after
// a tab of a name is its description.
func (e *Env) completeFrom(ask func(context.Context, *client.Client) ([]string, error)) completer {
	return func(_ *cobra.Command, args []string, toComplete string) ([]string, cobra.ShellCompDirective) {
		ctx, cancel := context.WithTimeout(context.Background(), completionLimit)
		defer cancel()
		c, err := e.Dial(ctx, false)
		if err != nil {
			return nil, cobra.ShellCompDirectiveNoFileComp
		}
		defer c.Close()
		names, err := ask(ctx, c)
		if err != nil {
			return nil, cobra.ShellCompDirectiveError
		}
		names = slices.DeleteFunc(names, func(n string) bool { return !offers(n, args, toComplete) })
		return names, cobra.ShellCompDirectiveNoFileComp
	}
}

func offers(completion string, args []string, toComplete string) bool {
	name, _, _ := strings.Cut(completion, "\t")
	return strings.HasPrefix(name, toComplete) && !slices.Contains(args, name)
}
