package daemon

import (
	"context"
	"errors"
	"net"
	"net/netip"
	"syscall"
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
			h.offBridge.Delete(id)
			return conn.(*net.TCPConn), nil
		}
		// A port that refuses is no failure of the bridge: the guest may show it to its localhost alone.
		if errors.Is(err, syscall.ECONNREFUSED) {
			h.logger.Debug("not over the bridge", "vm", v.Spec.Name, "port", port, "error", err)
		} else if _, told := h.offBridge.LoadOrStore(id, true); !told {
			h.logger.Warn("a VM is not reached over the bridge: its forwarded ports use the slower guest channel", "vm", v.Spec.Name, "port", port, "error", err)
		}
	}
	agent, err := h.engine.Agent(ctx, string(id))
	if err != nil {
		return nil, err
	}
	return guest.Dial(ctx, agent, port)
}
