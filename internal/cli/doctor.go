package cli

import (
	"cmp"
	"context"
	"fmt"
	"strings"
	"sync"

	"charm.land/lipgloss/v2"
	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/doctor"
	"banger/internal/doctor/host"
	"banger/internal/fault"
)

func newDoctorCommand(e *Env) *cobra.Command {
	var output outputFormat
	cmd := &cobra.Command{
		Use: "doctor", Short: "Check what this machine has and lacks; exit code 5 when something needed is missing",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDoctor(cmd.Context(), output, e) },
	}
	addOutputFlag(cmd, &output)
	return cmd
}

func runDoctor(ctx context.Context, output outputFormat, e *Env) error {
	return e.within(ctx, quickLimit, func(ctx context.Context) error {
		checks := append(host.Checks(e.Paths), e.daemonChecks(ctx)...)
		reports := doctor.Run(ctx, append(checks, e.catalogueChecks()...))
		v := doctorView{OK: doctor.OK(reports), Checks: views(reports, viewCheck)}
		if err := e.print(output, v, func() string { return e.describeChecks(v) }); err != nil {
			return err
		}
		if !v.OK {
			return silent(int(fault.Precondition))
		}
		return nil
	})
}

// daemonChecks tell what only a running daemon knows. They do not start one: doctor must work where a daemon cannot.
func (e *Env) daemonChecks(ctx context.Context) []doctor.Check {
	ask := sync.OnceValues(func() (*bangerv1.GetStatusResponse, error) { return e.daemonStatus(ctx) })
	of := func(name string, judge func(daemonView) doctor.Result) doctor.Check {
		return doctor.Check{Name: name, Hint: "banger daemon status tells more", Run: func(context.Context) doctor.Result {
			s, err := ask()
			switch {
			case err != nil:
				return doctor.Fail(err)
			case s == nil:
				return doctor.Note("the daemon is not running: the next command starts it")
			}
			return judge(viewDaemon(s, ""))
		}}
	}
	return []doctor.Check{of("daemon", judgeDrivers), of("network", judgeNetwork), of("names", judgeNames)}
}

// daemonStatus returns nil when no daemon runs.
func (e *Env) daemonStatus(ctx context.Context) (*bangerv1.GetStatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, doctor.Limit)
	defer cancel()
	if !listens(ctx, e.Paths.Socket()) {
		return nil, nil
	}
	c, err := e.Dial(ctx, false)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	return c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
}

// judgeDrivers tells which drivers the daemon finds usable.
func judgeDrivers(v daemonView) doctor.Result {
	var text []string
	for _, d := range v.Drivers {
		text = append(text, d.Name+" "+describeDriver(d))
	}
	if v.DefaultVMM == "" {
		return doctor.Missing("no driver can run VMs here: "+strings.Join(text, "; "), "")
	}
	return doctor.Good("VMs run on " + withReason(v.DefaultVMM, v.DefaultVMMReason) + "; drivers: " + strings.Join(text, "; "))
}

// judgeNetwork tells of clashes with other networks, and of what other firewalls keep from working. TAP devices that
// wait are capacity, and nothing to warn of.
func judgeNetwork(v daemonView) doctor.Result {
	wrong := v.Network.Notices
	if p := v.Network.SubnetProblem; p != "" {
		wrong = append([]string{p}, wrong...)
	}
	if len(wrong) > 0 {
		return doctor.Warn(strings.Join(wrong, "; "), "see docs/network.md")
	}
	if v.Subnet == "" {
		return doctor.Note("the first VM makes it")
	}
	text := fmt.Sprintf("bridge %s, %s; %d of %d TAP devices wait for VMs", v.Bridge, v.Subnet, v.Network.TAPsReady, v.Network.TAPsWanted)
	if chains := v.Network.OpenedChains; len(chains) > 0 {
		text += "; VMs' packets are let through " + strings.Join(chains, ", ")
	}
	return doctor.Good(text)
}

// judgeNames tells whether names of VMs are served.
func judgeNames(v daemonView) doctor.Result {
	if v.DNS.Problem != "" {
		return doctor.Warn(v.DNS.Problem, "")
	}
	if v.DNS.Listener == "" && v.DNS.Forwarder == "" {
		return doctor.Note("served nowhere (config.toml: [dns] listen)")
	}
	return doctor.Good(describeNames(v.DNS))
}

// catalogueChecks tell of images that are damaged, old or stale, and of damaged kernels. They start no daemon.
func (e *Env) catalogueChecks() []doctor.Check {
	of := func(name string, list func(context.Context, *client.Client) ([]doctored, error)) doctor.Check {
		return doctor.Check{Name: name, Run: func(ctx context.Context) doctor.Result {
			if !listens(ctx, e.Paths.Socket()) {
				return doctor.Note("not looked at: the daemon is not running")
			}
			c, err := e.Dial(ctx, false)
			if err != nil {
				return doctor.Fail(err)
			}
			defer c.Close()
			all, err := list(ctx, c)
			if err != nil {
				return doctor.Fail(err)
			}
			return judgeCatalogue(all)
		}}
	}
	return []doctor.Check{of("images", listImages), of("kernels", listKernels)}
}

// doctored is what doctor looks at of an image or a kernel.
type doctored struct {
	name, problem, notice string
	isDefault             bool
}

func listImages(ctx context.Context, c *client.Client) (all []doctored, err error) {
	res, err := c.Images.ListImages(ctx, &bangerv1.ListImagesRequest{})
	for _, i := range res.GetImages() {
		all = append(all, doctored{i.GetName(), i.GetProblem(), i.GetNotice(), i.GetIsDefault()})
	}
	return all, err
}

func listKernels(ctx context.Context, c *client.Client) (all []doctored, err error) {
	res, err := c.Images.ListKernels(ctx, &bangerv1.ListKernelsRequest{})
	for _, k := range res.GetKernels() {
		all = append(all, doctored{name: k.GetName(), problem: k.GetProblem(), isDefault: k.GetIsDefault()})
	}
	return all, err
}

// judgeCatalogue warns of what is damaged and of what one should know. Damage without a default that works is what keeps VMs from
// being made. Each problem and notice says itself what to type.
func judgeCatalogue(all []doctored) doctor.Result {
	var told []string
	damaged, usable := false, false
	for _, one := range all {
		damaged, usable = damaged || one.problem != "", usable || one.isDefault && one.problem == ""
		if what := cmp.Or(one.problem, one.notice); what != "" {
			told = append(told, one.name+": "+what)
		}
	}
	switch {
	case damaged && !usable:
		return doctor.Missing("no default that works; "+strings.Join(told, "; "), "")
	case len(told) > 0:
		return doctor.Warn(strings.Join(told, "; "), "")
	case len(all) == 0:
		return doctor.Note("none yet: banger setup makes the default")
	}
	return doctor.Good(fmt.Sprintf("%d, all of them sound", len(all)))
}

func viewCheck(r doctor.Report) checkView {
	return checkView{Name: r.Name, Status: string(r.Status), Message: r.Message, Hint: r.Hint}
}

var checkMarks = map[string]struct{ sign, colour string }{
	string(doctor.OKStatus): {"✓", "2"}, string(doctor.Warning): {"!", "3"}, string(doctor.MissingStatus): {"✗", "1"},
}

// describeChecks wraps long messages, so that nothing is cut away and all fits maxWidth.
func (e *Env) describeChecks(v doctorView) string {
	var b strings.Builder
	for _, c := range v.Checks {
		mark := checkMarks[c.Status]
		sign := mark.sign
		if e.colour(e.Stdout) {
			sign = lipgloss.NewStyle().Foreground(lipgloss.Color(mark.colour)).Render(sign)
		}
		text := c.Name + ": " + fault.Printable(c.Message)
		b.WriteString(sign + " " + indent(text, 2))
		if c.Hint != "" {
			b.WriteString("  hint: " + indent(fault.Printable(c.Hint), 8))
		}
	}
	return b.String()
}

// indent wraps text to maxWidth; its first line is taken to begin at column by already.
func indent(text string, by int) string {
	lines := strings.Split(lipgloss.Wrap(text, maxWidth-by, " "), "\n")
	return strings.Join(lines, "\n"+strings.Repeat(" ", by)) + "\n"
}
