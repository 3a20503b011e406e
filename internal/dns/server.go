// Package dns serves the names of running VMs: an authoritative server for the zone vm and the reverse zones of the
// VMs' subnets, and a forwarder that guests ask, which answers for these zones itself and asks the host's own name
// servers for the rest. Neither caches, so that what is answered is what is.
package dns

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/netip"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/net/netutil"

	"banger/internal/fault"
)

// Bounds of what askers can make us hold.
const (
	maxConnections = 128             // TCP connections at once, per listener
	maxPerTCP      = 128             // questions on one of them
	tcpIdle        = 8 * time.Second // between two questions on it (RFC 7766 6.2.3 asks for seconds)
	tcpFirst       = 2 * time.Second // until the first one
	maxQuestion    = 2048            // bytes of a question over UDP
	udpSize        = 1232            // bytes of an answer over UDP: what passes everywhere (DNS flag day 2020)
	readBuffer     = 1 << 20         // bytes of questions that wait
	closeTimeout   = 2 * time.Second
)

// Server holds a zone and answers for it on as many listeners as it is given. It is safe for concurrent use.
type Server struct {
	log    *slog.Logger
	table  atomic.Pointer[table]
	serial atomic.Uint32
}

// New returns a server of an empty zone.
func New(logger *slog.Logger) *Server {
	s := &Server{log: logger}
	s.serial.Store(uint32(time.Now().Unix())) // greater than what an earlier process said, for a while (RFC 1982)
	s.Set(Zone{})
	return s
}

// Set replaces what is served, at once.
func (s *Server) Set(z Zone) { s.table.Store(newTable(z, s.serial.Add(1))) }

// Records returns how many hosts have a name.
func (s *Server) Records() int { return len(s.table.Load().names) }

// Listener answers on one address, over UDP and TCP.
type Listener struct {
	address netip.AddrPort
	udp     *net.UDPConn
	tcp     *dns.Server
	done    sync.WaitGroup
}

// Listen answers authoritatively on address, which for port 0 gets one that is free. An address that is taken is a
// Conflict fault.
func (s *Server) Listen(address netip.AddrPort) (*Listener, error) {
	tcp, err := net.Listen("tcp", address.String())
	if err != nil {
		return nil, taken(address, err)
	}
	at := tcp.Addr().(*net.TCPAddr).AddrPort()
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(at))
	if err != nil {
		tcp.Close()
		return nil, taken(at, err)
	}
	return s.serve(udp, tcp, s.authoritative), nil
}

func taken(address netip.AddrPort, err error) error {
	if !errors.Is(err, syscall.EADDRINUSE) {
		return fault.Wrap(fault.Precondition, err, "names of VMs are not served: cannot listen on %s", address).
			WithHint(`choose another address in config.toml: [dns] listen = "127.0.0.1:42070"`)
	}
	return fault.Wrap(fault.Conflict, err, "names of VMs are not served: cannot listen on %s", address).
		WithHint(`end what listens there (ss -lnp "sport = :%d"), or choose another port in config.toml: [dns] listen = "127.0.0.1:42070"`, address.Port())
}

// serve takes over the sockets and answers on them with handle.
func (s *Server) serve(udp *net.UDPConn, tcp net.Listener, handle handler) *Listener {
	l := &Listener{address: tcp.Addr().(*net.TCPAddr).AddrPort(), udp: udp}
	_ = udp.SetReadBuffer(readBuffer) // as far as the kernel lets us: for bursts
	l.done.Go(func() { s.packets(udp, handle) })
	l.tcp = &dns.Server{
		Listener: netutil.LimitListener(tcp, maxConnections), Net: "tcp", MsgAcceptFunc: accept, MaxTCPQueries: maxPerTCP,
		Handler:     dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) { s.guard(w, m, handle) }),
		ReadTimeout: tcpFirst, WriteTimeout: tcpFirst, IdleTimeout: func() time.Duration { return tcpIdle },
	}
	started := make(chan struct{})
	l.tcp.NotifyStartedFunc = func() { close(started) }
	l.done.Go(func() {
		if err := l.tcp.ActivateAndServe(); err != nil && !errors.Is(err, net.ErrClosed) {
			s.log.Error("DNS listener ended", "address", l.address.String(), "error", err)
		}
	})
	<-started // a server can only be shut down once it has begun
	return l
}

// guard keeps one bad question from ending the daemon.
func (s *Server) guard(w writer, m *dns.Msg, handle handler) {
	defer func() {
		if p := recover(); p != nil {
			s.log.Error("panic", "in", "dns", "value", p)
			_ = w.Close()
		}
	}()
	handle(w, m)
}

// accept lets questions in, one in each message. Answers are dropped: who answers an answer can be made to talk
// to himself.
func accept(h dns.Header) dns.MsgAcceptAction {
	const response, opcodeShift, opcodeMask = 1 << 15, 11, 0xf
	switch {
	case h.Bits&response != 0:
		return dns.MsgIgnore
	case int(h.Bits>>opcodeShift)&opcodeMask != dns.OpcodeQuery:
		return dns.MsgRejectNotImplemented
	case h.Qdcount != 1 || h.Ancount > 1 || h.Nscount > 1 || h.Arcount > 2:
		return dns.MsgReject
	}
	return dns.MsgAccept
}

// Address returns where it listens.
func (l *Listener) Address() netip.AddrPort { return l.address }

// Close ends listening and connections.
func (l *Listener) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	err := errors.Join(l.udp.Close(), l.tcp.ShutdownContext(ctx))
	l.done.Wait()
	return err
}

// authoritative answers for our zones and refuses the rest.
func (s *Server) authoritative(w writer, m *dns.Msg) {
	t := s.table.Load()
	reply, ok := begin(m)
	if ok {
		if origin := t.origin(strings.ToLower(m.Question[0].Name)); origin != "" {
			t.answer(reply, m.Question[0], origin)
		} else {
			reply.Rcode = dns.RcodeRefused
		}
	}
	send(w, m, reply)
}

// begin returns an empty reply, and false when it says already what is wrong with the message.
func begin(m *dns.Msg) (reply *dns.Msg, ok bool) {
	reply = new(dns.Msg).SetReply(m)
	reply.Compress = true
	reply.RecursionAvailable = false
	if asked := m.IsEdns0(); asked != nil {
		reply.SetEdns0(udpSize, asked.Do())
		if asked.Version() != 0 { // RFC 6891 6.1.3
			reply.Rcode = dns.RcodeBadVers
			return reply, false
		}
	}
	q := m.Question[0]
	switch {
	case q.Qclass != dns.ClassINET && q.Qclass != dns.ClassANY:
		reply.Rcode = dns.RcodeRefused
	case q.Qtype == dns.TypeAXFR || q.Qtype == dns.TypeIXFR: // who has which VM is not for everybody
		reply.Rcode = dns.RcodeRefused
	default:
		return reply, true
	}
	return reply, false
}

// send answers, with what fits into the asker's packets.
func send(w writer, asked, reply *dns.Msg) {
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		size := dns.MinMsgSize
		if opt := asked.IsEdns0(); opt != nil {
			size = min(max(size, int(opt.UDPSize())), udpSize)
		}
		reply.Truncate(size)
	}
	_ = w.WriteMsg(reply) // an asker that is gone needs no answer
}
