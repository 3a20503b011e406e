package cli

import (
	"context"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"banger/internal/fault"
	"banger/internal/sshconfig"
)

func newSSHConfigCommand(e *Env) *cobra.Command {
	return group(
		"ssh-config", "Let ssh, scp, rsync, git and editors reach VMs by name: ssh NAME.vm",
		newSSHConfigVerb(e, "install", "Include banger's file in ~/.ssh/config", runSSHConfigInstall),
		newSSHConfigVerb(e, "uninstall", "Take back what install added", runSSHConfigUninstall),
		newSSHConfigVerb(e, "status", "Show whether ssh reaches VMs by name", runSSHConfigStatus),
		newSSHConfigPrintCommand(e),
	)
}

func newSSHConfigVerb(e *Env, use, short string, run func(context.Context, outputFormat, *Env) error) *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use: use, Short: short, Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return run(cmd.Context(), output, e) },
	}
	if use == "install" {
		cmd.Long = short + ", so that \"ssh web.vm\", scp, rsync, git and editors work without\n" +
			"options, with banger's own key and known hosts, and without a resolver that knows the name. The rest of the\n" +
			"file stays as it is."
	}
	addOutputFlag(cmd, &output)
	return cmd
}

func newSSHConfigPrintCommand(e *Env) *cobra.Command {
	return &cobra.Command{
		Use: "print", Short: "Print what install would have ssh read",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(*cobra.Command, []string) error {
			c, err := e.sshConfig()
			if err != nil {
				return err
			}
			text, err := c.Text()
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(e.Stdout, text)
			return err
		},
	}
}

// sshConfig says where ssh's configuration is, and what VMs are reached with.
func (e *Env) sshConfig() (sshconfig.Config, error) {
	home := e.Getenv("HOME")
	if home == "" {
		return sshconfig.Config{}, fault.New(fault.Precondition, "HOME is not set: where is your ~/.ssh/config?").WithHint("set HOME")
	}
	self, err := os.Executable()
	if err != nil {
		return sshconfig.Config{}, fault.Wrap(fault.Precondition, err, "cannot find our own executable")
	}
	return sshconfig.Config{
		Program: self, Key: e.Paths.SSHKey(), KnownHosts: e.Paths.KnownHosts(),
		Included: e.Paths.SSHConfig(), User: filepath.Join(home, ".ssh", "config"),
	}, nil
}

// sshConfigView is what the commands print.
type sshConfigView struct {
	Installed bool   `json:"installed"`
	Changed   bool   `json:"changed"`
	Config    string `json:"config"`
	Included  string `json:"included"`
	Problem   string `json:"problem"`
}

func runSSHConfigInstall(_ context.Context, output outputFormat, e *Env) error {
	c, err := e.sshConfig()
	if err != nil {
		return err
	}
	changed, err := c.Install()
	if err != nil {
		return err
	}
	text := "installed already: ssh NAME.vm\n"
	if changed {
		text = c.User + " includes " + c.Included + " now: ssh NAME.vm\n"
	}
	v := sshConfigView{Installed: true, Changed: changed, Config: c.User, Included: c.Included}
	return e.print(output, v, func() string { return text })
}

func runSSHConfigUninstall(_ context.Context, output outputFormat, e *Env) error {
	c, err := e.sshConfig()
	if err != nil {
		return err
	}
	changed, err := c.Uninstall()
	if err != nil {
		return err
	}
	text := "nothing was installed\n"
	if changed {
		text = c.User + " is as it was\n"
	}
	v := sshConfigView{Changed: changed, Config: c.User, Included: c.Included}
	return e.print(output, v, func() string { return text })
}

func runSSHConfigStatus(_ context.Context, output outputFormat, e *Env) error {
	c, err := e.sshConfig()
	if err != nil {
		return err
	}
	s, err := c.Status()
	if err != nil {
		return err
	}
	v := sshConfigView{Installed: s.Installed, Config: c.User, Included: c.Included}
	switch {
	case s.Other != "":
		v.Problem = "it includes another file: " + s.Other
	case s.Included && !s.Current:
		v.Problem = "the included file is not as this banger writes it; renew it: banger ssh-config install"
	}
	return e.print(output, v, func() string {
		return fields([]field{{"installed", yesNo(v.Installed)}, {"config", v.Config}, {"included", v.Included}, {"problem", v.Problem}})
	})
}
