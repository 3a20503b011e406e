package cli

import (
	"context"
	"net/netip"
	"strings"
	"time"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/splitdns"
	"banger/internal/system"
)

type dnsOptions struct {
	server string
	output outputFormat
}

func newDNSCommand(e *Env) *cobra.Command {
	return group(
		"dns", "Let this host find VMs by name: NAME.vm",
		newDNSInstallCommand(e), newDNSUninstallCommand(e), newDNSStatusCommand(e),
	)
}

func (o *dnsOptions) addServerFlag(cmd *cobra.Command) {
	cmd.Flags().StringVar(&o.server, "server", "", "where banger serves names (default: what the daemon says, else "+paths.DNSAddress+")")
	if err := cmd.RegisterFlagCompletionFunc("server", cobra.NoFileCompletions); err != nil {
		panic(err) // the flag exists: it was added above
	}
}

func newDNSInstallCommand(e *Env) *cobra.Command {
	var o dnsOptions
	cmd := &cobra.Command{
		Use: "install", Short: "Make this host's resolver ask banger for .vm, and for nothing else",
		Long: "Make this host's resolver ask banger for names below .vm, and for nothing else. It knows systemd-resolved,\n" +
			"NetworkManager's dnsmasq and a dnsmasq of its own, adds one file to its configuration and lets it read that again.\n" +
			"resolv.conf is never touched. It takes an administrator; \"banger ssh-config install\" does not.",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDNSInstall(cmd.Context(), o, e) },
	}
	o.addServerFlag(cmd)
	addOutputFlag(cmd, &o.output)
	return cmd
}

func newDNSUninstallCommand(e *Env) *cobra.Command {
	var o dnsOptions
	cmd := &cobra.Command{
		Use: "uninstall", Short: "Take back what install added",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDNSUninstall(cmd.Context(), o, e) },
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func newDNSStatusCommand(e *Env) *cobra.Command {
	var o dnsOptions
	cmd := &cobra.Command{
		Use: "status", Short: "Show where names are served and who asks there",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDNSStatus(cmd.Context(), o, e) },
	}
	o.addServerFlag(cmd)
	addOutputFlag(cmd, &o.output)
	return cmd
}

// thisHost is the machine, whose resolver's programs are run.
func thisHost() splitdns.Host {
	return splitdns.Host{Root: "/", Run: func(ctx context.Context, argv ...string) ([]byte, error) {
		return system.Run(ctx, system.Command{Path: argv[0], Args: argv[1:], Timeout: 30 * time.Second})
	}}
}

// dnsView is what a command about the host's resolver prints.
type dnsView struct {
	Resolver  string   `json:"resolver"`
	Installed bool     `json:"installed"`
	Files     []string `json:"files"`
	Changed   bool     `json:"changed"`
}

func runDNSInstall(ctx context.Context, o dnsOptions, e *Env) error {
	return e.within(ctx, quickLimit, func(ctx context.Context) error {
		server, _, err := e.dnsServer(ctx, o.server)
		if err != nil {
			return err
		}
		done, err := thisHost().Install(ctx, server)
		if err != nil {
			return err
		}
		text := "names below .vm are asked of banger by " + done.Method + " already\n"
		if done.Changed {
			text = done.Method + " asks banger for names below .vm now: " + strings.Join(done.Files, ", ") + "\n"
		}
		v := dnsView{Resolver: done.Method, Installed: true, Files: list(done.Files), Changed: done.Changed}
		return e.print(o.output, v, func() string { return text })
	})
}

func runDNSUninstall(ctx context.Context, o dnsOptions, e *Env) error {
	return e.within(ctx, quickLimit, func(ctx context.Context) error {
		done, err := thisHost().Uninstall(ctx)
		if err != nil {
			return err
		}
		text := "nothing was installed\n"
		if done.Changed {
			text = "removed " + strings.Join(done.Files, ", ") + "\n"
		}
		v := dnsView{Resolver: done.Method, Files: list(done.Files), Changed: done.Changed}
		return e.print(o.output, v, func() string { return text })
	})
}

// dnsServer returns where names are served: as wished, as a running daemon says, or where they are by default.
func (e *Env) dnsServer(ctx context.Context, wished string) (netip.AddrPort, *bangerv1.DNSStatus, error) {
	status := e.daemonDNS(ctx)
	text := paths.DNSAddress
	if l := status.GetListener(); l != "" {
		text = l
	}
	if wished != "" {
		text = wished
	}
	server, err := netip.ParseAddrPort(text)
	if err != nil || !server.Addr().IsLoopback() {
		return server, status, fault.New(fault.Usage, "--server %q is no loopback address with a port", text).WithHint("for example %s", paths.DNSAddress)
	}
	return server, status, nil
}

// daemonDNS returns what a running daemon says of its names; nil when none runs: a question starts none.
func (e *Env) daemonDNS(ctx context.Context) *bangerv1.DNSStatus {
	if !listens(ctx, e.Paths.Socket()) {
		return nil
	}
	c, err := e.Dial(ctx, false)
	if err != nil {
		return nil
	}
	defer c.Close()
	s, err := c.Daemon.GetStatus(ctx, &bangerv1.GetStatusRequest{})
	if err != nil {
		return nil
	}
	return s.GetDns()
}

// dnsStatusView is what "dns status" prints.
type dnsStatusView struct {
	Zone      string   `json:"zone"`
	Listener  string   `json:"listener"`
	Forwarder string   `json:"forwarder"`
	Records   int32    `json:"records"`
	Problem   string   `json:"problem"`
	Resolver  string   `json:"resolver"`
	Installed bool     `json:"installed"`
	Files     []string `json:"files"`
	Answers   bool     `json:"answers"`
	Hint      string   `json:"hint"`
}

// answersLimit bounds the question whether the host's resolver knows the zone.
const answersLimit = 3 * time.Second

func runDNSStatus(ctx context.Context, o dnsOptions, e *Env) error {
	return e.within(ctx, quickLimit, func(ctx context.Context) error {
		server, daemon, err := e.dnsServer(ctx, o.server)
		if err != nil {
			return err
		}
		host := thisHost().Status(ctx, server)
		asking, cancel := context.WithTimeout(ctx, answersLimit)
		defer cancel()
		v := dnsStatusView{
			Zone: daemon.GetZone(), Listener: daemon.GetListener(), Forwarder: daemon.GetForwarder(), Records: daemon.GetRecords(),
			Problem: daemon.GetProblem(), Resolver: host.Method, Installed: host.Installed, Files: list(host.Files),
			Answers: splitdns.Answers(asking), Hint: host.Problem,
		}
		if daemon == nil {
			v.Problem = "the daemon is not running"
		}
		return e.print(o.output, v, func() string { return describeDNS(v) })
	})
}

func describeDNS(v dnsStatusView) string {
	served := v.Listener
	if served == "" {
		served = "nowhere"
	}
	resolver := v.Resolver
	if resolver == "" {
		resolver = "none that can ask banger"
	}
	return fields([]field{
		{"served on", served},
		{"for guests on", v.Forwarder},
		{"records", plural(int(v.Records), "name")},
		{"problem", v.Problem},
		{"host's resolver", resolver},
		{"installed", yesNo(v.Installed)},
		{"files", strings.Join(v.Files, ", ")},
		{"names resolve", yesNo(v.Answers)},
		{"note", v.Hint},
	})
}
