package daemon

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"testing"
)

// socketsOnce is a network whose address is taken once it is listened on.
type socketsOnce struct {
	mu    sync.Mutex
	taken bool
}

func (s *socketsOnce) ListenDNS(_ context.Context, bridge netip.Prefix) (*net.UDPConn, net.Listener, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.taken {
		return nil, nil, net.ErrClosed
	}
	at := netip.AddrPortFrom(bridge.Addr(), 0)
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, nil, err
	}
	tcp, err := net.Listen("tcp", udp.LocalAddr().String())
	s.taken = err == nil
	return udp, tcp, err
}

// The first VMs that a daemon makes may be several at once: all of them are served names.
func TestGuestsThatComeAtOnceAreServed(t *testing.T) {
	n := newNames(&socketsOnce{}, func() []netip.Prefix { return nil }, slog.New(slog.DiscardHandler))
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			if !n.ServeGuests(t.Context(), netip.MustParsePrefix("127.0.0.1/8")) {
				t.Error("one is not served")
			}
		})
	}
	all.Wait()
	if err := n.close(); err != nil {
		t.Error(err)
	}
}
