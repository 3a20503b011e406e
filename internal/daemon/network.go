package daemon

import (
	"banger/internal/hostnet"
	"banger/internal/server"
	"banger/internal/vm"
)

// networkStatus tells what there is of the host's network for VMs.
func (h *house) networkStatus() server.Network {
	var n server.Network
	subnet := h.currentSubnet()
	if subnet.IsValid() {
		n.Subnet6 = vm.IPv6Prefix(subnet).String()
	}
	c, ok := h.network.(*hostnet.Client)
	if !ok {
		return n
	}
	s := c.Status()
	n.TAPsReady, n.TAPsWanted, n.Notices, n.OpenedChains = s.Ready, s.Wanted, s.Notices, s.Opened
	routes, err := hostnet.ReadRoutes()
	if err != nil || !subnet.IsValid() {
		return n
	}
	if r, clash := hostnet.Clash(subnet, routes, h.config.bridge); clash {
		n.SubnetProblem = hostnet.ClashFault(subnet, r).Error()
	}
	return n
}
