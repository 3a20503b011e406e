package dns

import (
	"context"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/miekg/dns"
)

// Bounds of the forwarder.
const (
	maxForwards     = 256             // questions of guests under way; further ones are told to try again
	maxForwardsEach = 64              // of one guest, so that one cannot keep its siblings from asking
	upstreamTimeout = 2 * time.Second // for one answer of one server
	forwardTimeout  = 4 * time.Second // for all of them: a guest's resolver waits 5 s (resolv.conf(5))
	rereadPause     = time.Second     // between two looks at resolv.conf
	maxUpstreams    = 3               // MAXNS of resolv.conf(5)
)

// Forwarder answers guests: for our zones itself, for the rest what the host's own name servers say. These are read
// from the host's resolv.conf, a local stub of systemd-resolved or dnsmasq included, so that the split DNS of a VPN
// on the host holds for guests.
type Forwarder struct {
	server    *Server
	log       *slog.Logger
	own       netip.Addr // that guests ask
	upstreams *upstreams
	slots     slots
	under     sync.WaitGroup // questions under way
	life      context.Context
	end       context.CancelFunc
	*Listener
}

// Forward takes over sockets on the address that guests ask. resolvConf is the path of the host's resolv.conf.
func (s *Server) Forward(udp *net.UDPConn, tcp net.Listener, resolvConf string) *Forwarder {
	f := &Forwarder{
		server: s, log: s.log, upstreams: &upstreams{path: resolvConf, dial: (&net.Dialer{Timeout: upstreamTimeout}).DialContext}, slots: slots{each: map[netip.Addr]int{}},
	}
	f.life, f.end = context.WithCancel(context.Background())
	own := tcp.Addr().(*net.TCPAddr).AddrPort()
	f.own = own.Addr().Unmap()
	f.upstreams.own = netip.AddrPortFrom(f.own, own.Port())
	f.Listener = s.serve(udp, tcp, f.answer) // which answers already while this is assigned
	return f
}

// Close ends listening and the questions under way.
func (f *Forwarder) Close() error {
	f.end()
	err := f.Listener.Close()
	f.under.Wait()
	return err
}

// answer serves one guest. Only addresses in our subnets are answered at all: the address of a bridge can be
// reached over the host's other interfaces.
func (f *Forwarder) answer(w writer, m *dns.Msg) {
	t := f.server.table.Load()
	from := remote(w)
	if !t.knows(from, f.own) {
		_ = w.Close()
		return
	}
	reply, ok := begin(m)
	reply.RecursionAvailable = true
	if !ok {
		send(w, m, reply)
		return
	}
	if origin := t.origin(strings.ToLower(m.Question[0].Name)); origin != "" {
		t.answer(reply, m.Question[0], origin)
		send(w, m, reply)
		return
	}
	if !t.forward[from] {
		reply.Rcode = dns.RcodeRefused
		send(w, m, reply)
		return
	}
	f.forward(w, m, reply)
}

// knows tells whether who asks is one of our guests, or the host itself.
func (t *table) knows(from, own netip.Addr) bool {
	if from == own {
		return true
	}
	_, known := t.forward[from]
	return known
}

func remote(w writer) netip.Addr {
	a, err := netip.ParseAddrPort(w.RemoteAddr().String())
	if err != nil {
		return netip.Addr{}
	}
	return a.Addr().Unmap().WithZone("")
}

// forward passes on the answer of the host's servers, without holding up whoever asks next over UDP.
func (f *Forwarder) forward(w writer, m, reply *dns.Msg) {
	if !f.slots.take(remote(w)) {
		reply.Rcode = dns.RcodeServerFailure
		send(w, m, reply)
		return
	}
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		f.under.Go(func() { f.passOn("udp", w, m, reply) })
		return
	}
	f.passOn("tcp", w, m, reply)
}

// slots bound the questions under way.
type slots struct {
	mu   sync.Mutex
	all  int
	each map[netip.Addr]int
}

// take tells whether a guest may have one more question under way.
func (s *slots) take(guest netip.Addr) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.all >= maxForwards || s.each[guest] >= maxForwardsEach {
		return false
	}
	s.all++
	s.each[guest]++
	return true
}

func (s *slots) give(guest netip.Addr) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.all--
	if s.each[guest]--; s.each[guest] <= 0 {
		delete(s.each, guest)
	}
}

// passOn asks the host's servers and answers with what they say; it gives the slot back.
func (f *Forwarder) passOn(network string, w writer, m, reply *dns.Msg) {
	defer f.slots.give(remote(w))
	ctx, cancel := context.WithTimeout(f.life, forwardTimeout)
	defer cancel()
	asked := m.Copy()
	asked.Id = dns.Id() // not one that the guest knows: it must not be able to guess answers for others
	if answer := f.ask(ctx, network, asked); answer != nil {
		answer.Id = m.Id
		_ = w.WriteMsg(fitting(w, m, answer)) // an asker that is gone needs no answer
		return
	}
	reply.Rcode = dns.RcodeServerFailure
	send(w, m, reply)
}

// ask returns the answer of the first server that gives one, or nil.
func (f *Forwarder) ask(ctx context.Context, network string, m *dns.Msg) *dns.Msg {
	var last *dns.Msg
	for _, server := range f.upstreams.list() {
		answer, err := f.exchange(ctx, network, m, server)
		switch {
		case err != nil && answer != nil && network == "udp": // cut off in the middle: the guest asks again over TCP
			answer.Truncated = true
			return answer
		case err != nil:
			f.log.Debug("a name server does not answer", "server", server, "error", err)
		case answer.Rcode == dns.RcodeServerFailure || answer.Rcode == dns.RcodeRefused || answer.Rcode == dns.RcodeNotImplemented:
			last = answer // as resolvers do: another one may know
		default:
			return answer
		}
		if ctx.Err() != nil {
			return last
		}
	}
	return last
}

// exchange asks one server. An answer that comes with an error was cut off.
func (f *Forwarder) exchange(ctx context.Context, network string, m *dns.Msg, server string) (*dns.Msg, error) {
	conn, err := f.upstreams.dial(ctx, network, server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	client := dns.Client{Net: network, Timeout: upstreamTimeout}
	answer, _, err := client.ExchangeWithConnContext(ctx, m, &dns.Conn{Conn: conn, UDPSize: dns.MaxMsgSize})
	return answer, err
}

// fitting shortens an answer to what the guest's packets hold.
func fitting(w writer, asked, answer *dns.Msg) *dns.Msg {
	if _, udp := w.RemoteAddr().(*net.UDPAddr); udp {
		size := dns.MinMsgSize
		if opt := asked.IsEdns0(); opt != nil {
			size = max(size, int(opt.UDPSize()))
		}
		if answer.Len() > size {
			answer.Truncate(size)
		}
	}
	return answer
}

// upstreams are the host's name servers, read again when resolv.conf has changed.
type upstreams struct {
	path string
	own  netip.AddrPort // never asked: that would be a circle
	dial func(ctx context.Context, network, address string) (net.Conn, error)

	mu      sync.Mutex
	looked  time.Time
	changed time.Time // mtime of what was read
	servers []string  // host:port
}

func (u *upstreams) list() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	if time.Since(u.looked) < rereadPause {
		return u.servers
	}
	u.looked = time.Now()
	info, err := os.Stat(u.path)
	if err != nil {
		u.servers, u.changed = nil, time.Time{}
		return nil
	}
	if info.ModTime().Equal(u.changed) {
		return u.servers
	}
	config, err := dns.ClientConfigFromFile(u.path)
	if err != nil {
		u.servers = nil
		return nil
	}
	u.changed, u.servers = info.ModTime(), nil
	for _, server := range config.Servers {
		a, err := netip.ParseAddr(server)
		if err != nil || netip.AddrPortFrom(a.Unmap(), 53) == u.own || len(u.servers) == maxUpstreams {
			continue
		}
		u.servers = append(u.servers, net.JoinHostPort(server, config.Port))
	}
	return u.servers
}
