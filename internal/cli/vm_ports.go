package cli

import (
	"context"
	"net"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/client"
	"banger/internal/fault"
	"banger/internal/vm"
)

type portsOptions struct {
	name   string
	ports  []string
	output outputFormat
}

func newVMPortsCommand(e *Env) *cobra.Command {
	return group(
		"ports", "Ports of this host that lead into VMs",
		newVMPortsAddCommand(e), newVMPortsRemoveCommand(e), newVMPortsListCommand(e),
	)
}

func newVMPortsAddCommand(e *Env) *cobra.Command {
	var o portsOptions
	cmd := &cobra.Command{
		Use: "add NAME [ADDRESS:]HOSTPORT:GUESTPORT...", Short: "Forward ports of this host into a VM",
		Long: "Forward TCP ports of this host into a VM, at once when it runs and whenever it does. Without an address they listen\n" +
			"on 127.0.0.1, for this host alone. Services on the guest's localhost are reached as well.",
		Example: "banger vm ports add web 8080:80\nbanger vm ports add web 127.0.0.2:5432:5432 3000",
		Args:    nameAndPorts, ValidArgsFunction: e.completeOneVM(isAny),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name, o.ports = args[0], args[1:]
			return runVMPortsAdd(cmd.Context(), o, e)
		},
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func newVMPortsRemoveCommand(e *Env) *cobra.Command {
	var o portsOptions
	cmd := &cobra.Command{
		Use: "remove NAME [ADDRESS:]HOSTPORT...", Aliases: []string{"rm"}, Short: "Forward ports no longer; their connections end",
		Example: "banger vm ports remove web 8080",
		Args:    nameAndPorts, ValidArgsFunction: e.completeOneVM(isAny),
		RunE: func(cmd *cobra.Command, args []string) error {
			o.name, o.ports = args[0], args[1:]
			return runVMPortsRemove(cmd.Context(), o, e)
		},
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func newVMPortsListCommand(e *Env) *cobra.Command {
	var o portsOptions
	cmd := &cobra.Command{
		Use: "list [NAME]", Aliases: []string{"ls"}, Short: "List the forwarded ports of a VM, or of all",
		Args: optionalName, ValidArgsFunction: e.completeOneVM(isAny),
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				o.name = args[0]
			}
			return runVMPortsList(cmd.Context(), o, e)
		},
	}
	addOutputFlag(cmd, &o.output)
	return cmd
}

func nameAndPorts(cmd *cobra.Command, args []string) error {
	if len(args) == 1 {
		return usage(cmd, "a port is missing")
	}
	return someNames(cmd, args)
}

// portForwards reads forwards as people write them.
func portForwards(texts []string) ([]*bangerv1.PortForward, error) {
	var all []*bangerv1.PortForward
	for _, text := range texts {
		p, err := vm.ParsePort(text)
		if err != nil {
			return nil, err
		}
		all = append(all, &bangerv1.PortForward{HostAddress: p.Host.Addr().String(), HostPort: int32(p.Host.Port()), GuestPort: int32(p.Guest)})
	}
	return all, nil
}

// hostSides reads forwards of which the guest's port may be left out.
func hostSides(texts []string) ([]*bangerv1.PortForward, error) {
	var all []*bangerv1.PortForward
	for _, text := range texts {
		if host, port, err := net.SplitHostPort(text); err == nil && net.ParseIP(host) != nil {
			number, err := strconv.ParseUint(port, 10, 16)
			if err != nil || number == 0 {
				return nil, fault.New(fault.Usage, "%q is no port of this host", text).WithHint("write it like 8080 or 127.0.0.1:8080")
			}
			all = append(all, &bangerv1.PortForward{HostAddress: host, HostPort: int32(number)})
			continue
		}
		parsed, err := portForwards([]string{text})
		if err != nil {
			return nil, err
		}
		if _, err := strconv.Atoi(text); err == nil {
			parsed[0].GuestPort = 0
		}
		all = append(all, parsed...)
	}
	return all, nil
}

func runVMPortsAdd(ctx context.Context, o portsOptions, e *Env) error {
	ports, err := portForwards(o.ports)
	if err != nil {
		return err
	}
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Network.AddPorts(ctx, &bangerv1.AddPortsRequest{Vm: o.name, Ports: ports})
		if err != nil {
			return err
		}
		return e.printPorts(o.output, res.GetVm())
	})
}

func runVMPortsRemove(ctx context.Context, o portsOptions, e *Env) error {
	ports, err := hostSides(o.ports)
	if err != nil {
		return err
	}
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Network.RemovePorts(ctx, &bangerv1.RemovePortsRequest{Vm: o.name, Ports: ports})
		if err != nil {
			return err
		}
		return e.printPorts(o.output, res.GetVm())
	})
}

// printPorts prints the VM as JSON; people see only what went wrong.
func (e *Env) printPorts(output outputFormat, v *bangerv1.VM) error {
	if !output.json() {
		return nil
	}
	return e.printJSON(viewVM(v))
}

// portView is a forward in a VM's JSON.
type portView struct {
	HostAddress string `json:"host_address"`
	HostPort    int32  `json:"host_port"`
	GuestPort   int32  `json:"guest_port"`
}

func viewPort(p *bangerv1.PortForward) portView {
	return portView{HostAddress: p.GetHostAddress(), HostPort: p.GetHostPort(), GuestPort: p.GetGuestPort()}
}

func hostSide(address string, port int32) string {
	return net.JoinHostPort(address, strconv.Itoa(int(port)))
}

// portStatusView is a line of "vm ports list".
type portStatusView struct {
	VM          string `json:"vm"`
	HostAddress string `json:"host_address"`
	HostPort    int32  `json:"host_port"`
	GuestPort   int32  `json:"guest_port"`
	Listening   bool   `json:"listening"`
	Connections int32  `json:"connections"`
	Problem     string `json:"problem"`
}

func runVMPortsList(ctx context.Context, o portsOptions, e *Env) error {
	return e.quickly(ctx, func(ctx context.Context, c *client.Client) error {
		res, err := c.Network.ListPorts(ctx, &bangerv1.ListPortsRequest{Vm: o.name})
		if err != nil {
			return err
		}
		all := views(res.GetPorts(), func(p *bangerv1.PortStatus) portStatusView {
			f := p.GetPort()
			return portStatusView{
				VM: p.GetVm(), HostAddress: f.GetHostAddress(), HostPort: f.GetHostPort(), GuestPort: f.GetGuestPort(),
				Listening: p.GetListening(), Connections: p.GetConnections(), Problem: p.GetProblem(),
			}
		})
		return e.print(o.output, all, func() string { return e.portsTable(all) })
	})
}

func (e *Env) portsTable(all []portStatusView) string {
	rows := make([][]string, len(all))
	for i, p := range all {
		state := "closed"
		switch {
		case p.Listening:
			state = "open"
		case p.Problem != "":
			state = p.Problem
		}
		rows[i] = []string{p.VM, hostSide(p.HostAddress, p.HostPort), strconv.Itoa(int(p.GuestPort)), state, strconv.Itoa(int(p.Connections))}
	}
	return e.table([]column{
		{title: "VM", flexible: true},
		{title: "HOST"},
		{title: "GUEST", right: true},
		{title: "STATE", flexible: true},
		{title: "CONNECTIONS", right: true},
	}, rows)
}

func portsText(all []portView) string {
	texts := make([]string, len(all))
	for i, p := range all {
		texts[i] = hostSide(p.HostAddress, p.HostPort) + " to " + strconv.Itoa(int(p.GuestPort))
	}
	return strings.Join(texts, ", ")
}
