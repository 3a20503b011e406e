package daemon

import (
	"context"
	"net"
	"net/netip"
	"time"

	"banger/internal/forward"
	"banger/internal/guest"
	"banger/internal/vm"
)

// bridgeTimeout is for a connection over the bridge: the guest's kernel answers at once, or its firewall never.
const bridgeTimeout = time.Second

// dialGuest connects to a port inside a running VM: over the bridge, which is fast; a service that the guest does not
// show to the bridge, such as one that listens on its localhost, over the guest channel.
func (h *house) dialGuest(ctx context.Context, id vm.ID, port uint16) (forward.Conn, error) {
	v, err := h.engine.Get(ctx, string(id))
	if err != nil {
		return nil, err
	}
	if !h.options.FakeVMM && v.IP.IsValid() {
		conn, err := (&net.Dialer{Timeout: bridgeTimeout}).DialContext(ctx, "tcp", netip.AddrPortFrom(v.IP, port).String())
		if err == nil {
			return conn.(*net.TCPConn), nil
		}
		h.logger.Debug("not over the bridge", "vm", v.Spec.Name, "port", port, "error", err)
	}
	agent, err := h.engine.Agent(ctx, string(id))
	if err != nil {
		return nil, err
	}
	return guest.Dial(ctx, agent, port)
}
