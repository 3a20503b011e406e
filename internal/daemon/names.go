package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"sync"
	"time"

	"banger/internal/dns"
	"banger/internal/fault"
	"banger/internal/server"
	"banger/internal/vm"
)

// listenPause is between two attempts to listen on an address that is taken.
const listenPause = 10 * time.Second

// hostResolvConf says whom the host asks.
const hostResolvConf = "/etc/resolv.conf"

// names serves the names of VMs to the host and to guests. What keeps it from that is told once in the log and all the time
// by the daemon's status, and hurts nothing else.
type names struct {
	server  *dns.Server
	log     *slog.Logger
	network any // that of the VMs, if it can open sockets for guests
	subnets func() []netip.Prefix

	opening sync.Mutex // held by whoever opens sockets for guests: a second one would find the address taken

	mu        sync.Mutex
	closed    bool
	listener  *dns.Listener
	forwarder *dns.Forwarder
	problems  map[string]error // by "listener" and "forwarder"
}

// socketMaker is a network that opens sockets on port 53 of the bridge's address.
type socketMaker interface {
	ListenDNS(ctx context.Context, bridge netip.Prefix) (*net.UDPConn, net.Listener, error)
}

func newNames(network any, subnets func() []netip.Prefix, logger *slog.Logger) *names {
	return &names{server: dns.New(logger), log: logger, network: network, subnets: subnets, problems: map[string]error{}}
}

// listen serves the host on address from now on, or else as soon as it is free, unless ctx ends first. It comes after the
// reconcile: until then the names of VMs that run are not known, and would be denied.
func (n *names) listen(ctx context.Context, address netip.AddrPort) {
	if n.listens(address) {
		return
	}
	go func() { // it ends with ctx
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(listenPause):
			}
			if n.listens(address) {
				return
			}
		}
	}()
}

// listens tries to serve the host on address.
func (n *names) listens(address netip.AddrPort) bool {
	l, err := n.server.Listen(address)
	if n.note("listener", err) && err == nil {
		n.log.Info("names are served", "address", l.Address().String())
	}
	if err == nil {
		n.keep(l)
	}
	return err == nil
}

func (n *names) keep(l *dns.Listener) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.closed {
		_ = l.Close() // it answered nobody
		return
	}
	n.listener = l
}

// note keeps what is wrong with a part, or that nothing is, and logs a problem that is new. It tells whether
// something changed.
func (n *names) note(part string, err error) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	before := n.problems[part]
	n.problems[part] = err
	if err == nil {
		return true
	}
	if before != nil && before.Error() == err.Error() {
		return false
	}
	n.log.Warn("names", "part", part, "error", err, "hint", fault.HintOf(err))
	return true
}

// Publish makes these the hosts that have a name.
func (n *names) Publish(hosts []dns.Host) {
	n.server.Set(dns.Zone{Hosts: hosts, Subnets: n.subnets()})
}

// ServeGuests answers guests on the bridge's address, and tells whether it does.
func (n *names) ServeGuests(ctx context.Context, bridge netip.Prefix) bool {
	maker, ok := n.network.(socketMaker)
	if !ok {
		return false
	}
	n.opening.Lock()
	defer n.opening.Unlock()
	n.mu.Lock()
	current := n.forwarder
	n.mu.Unlock()
	if current != nil && current.Address().Addr() == bridge.Addr() {
		return true
	}
	udp, tcp, err := maker.ListenDNS(ctx, bridge)
	if err == nil {
		err = n.replaceForwarder(n.server.Forward(udp, tcp, hostResolvConf), bridge)
	}
	n.note("forwarder", err)
	return err == nil
}

// replaceForwarder takes a new forwarder in, unless another one got there first.
func (n *names) replaceForwarder(f *dns.Forwarder, bridge netip.Prefix) error {
	n.mu.Lock()
	old := n.forwarder
	if n.closed || old != nil && old.Address().Addr() == bridge.Addr() {
		old = f
	} else {
		n.forwarder = f
	}
	n.mu.Unlock()
	if old == nil {
		return nil
	}
	return old.Close()
}

// close ends listening.
func (n *names) close() error {
	n.mu.Lock()
	n.closed = true
	listener, forwarder := n.listener, n.forwarder
	n.listener, n.forwarder = nil, nil
	n.mu.Unlock()
	var errs []error
	if listener != nil {
		errs = append(errs, listener.Close())
	}
	if forwarder != nil {
		errs = append(errs, forwarder.Close())
	}
	return errors.Join(errs...)
}

// status tells what is served where.
func (n *names) status() server.DNS {
	n.mu.Lock()
	defer n.mu.Unlock()
	s := server.DNS{Zone: dns.Origin, Records: n.server.Records()}
	if n.listener != nil {
		s.Listener = n.listener.Address().String()
	}
	if n.forwarder != nil {
		s.Forwarder = n.forwarder.Address().String()
	}
	for _, part := range []string{"listener", "forwarder"} {
		err := n.problems[part]
		if err == nil {
			continue
		}
		if s.Problem != "" {
			s.Problem += "; "
		}
		s.Problem += err.Error()
		if hint := fault.HintOf(err); hint != "" {
			s.Problem += " (" + hint + ")"
		}
	}
	return s
}

// subnets are those that VMs have their addresses in.
func (h *house) subnets() []netip.Prefix {
	subnet := h.currentSubnet()
	if !subnet.IsValid() {
		return nil
	}
	return []netip.Prefix{subnet, vm.IPv6Prefix(subnet).Masked()}
}
