package dns

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/miekg/dns"
	"golang.org/x/sync/errgroup"

	"banger/internal/fault"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

func TestMain(m *testing.M) { hosttest.Main(m) }

var (
	quiet = slog.New(slog.DiscardHandler)
	any   = netip.MustParseAddrPort("127.0.0.1:0")
	zone  = Zone{
		Hosts: []Host{
			{Name: "web", Addresses: addresses("172.30.0.2", "fdb1::ac1e:2"), Forward: true},
			{Name: "db", Addresses: addresses("172.30.1.3")},
		},
		Subnets: []netip.Prefix{netip.MustParsePrefix("172.30.0.0/16"), netip.MustParsePrefix("fdb1::ac1e:0/112")},
	}
)

func addresses(texts ...string) (all []netip.Addr) {
	for _, t := range texts {
		all = append(all, netip.MustParseAddr(t))
	}
	return all
}

func serve(t testing.TB, z Zone) (*Server, string) {
	t.Helper()
	s := New(quiet)
	s.Set(z)
	l, err := s.Listen(any)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return s, l.Address().String()
}

func ask(t testing.TB, network, server, name string, qtype uint16) *dns.Msg {
	t.Helper()
	m := new(dns.Msg).SetQuestion(name, qtype)
	c := dns.Client{Net: network, Timeout: 10 * time.Second}
	reply, _, err := c.Exchange(m, server)
	if err != nil {
		t.Fatalf("%s %s over %s: %v", name, dns.TypeToString[qtype], network, err)
	}
	return reply
}

// said is an answer in one line: its code, whether it is authoritative, the answers, and the authority.
func said(m *dns.Msg) string {
	text := dns.RcodeToString[m.Rcode]
	if m.Authoritative {
		text += " aa"
	}
	for _, rr := range m.Answer {
		text += " " + rr.Header().Name + " " + dns.TypeToString[rr.Header().Rrtype] + " " + data(rr)
	}
	for _, rr := range m.Ns {
		text += " / " + rr.Header().Name + " " + dns.TypeToString[rr.Header().Rrtype]
	}
	return text
}

func data(rr dns.RR) string {
	switch rr := rr.(type) {
	case *dns.A:
		return rr.A.String()
	case *dns.AAAA:
		return rr.AAAA.String()
	case *dns.PTR:
		return rr.Ptr
	case *dns.NS:
		return rr.Ns
	}
	return "..."
}

func TestAnswers(t *testing.T) {
	_, server := serve(t, zone)
	v6, err := dns.ReverseAddr("fdb1::ac1e:2")
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name  string
		qtype uint16
		want  string
	}{
		{"web.vm.", dns.TypeA, "NOERROR aa web.vm. A 172.30.0.2"},
		{"WeB.Vm.", dns.TypeA, "NOERROR aa WeB.Vm. A 172.30.0.2"},
		{"web.vm.", dns.TypeAAAA, "NOERROR aa web.vm. AAAA fdb1::ac1e:2"},
		{"web.vm.", dns.TypeANY, "NOERROR aa web.vm. A 172.30.0.2 web.vm. AAAA fdb1::ac1e:2"},
		{"db.vm.", dns.TypeAAAA, "NOERROR aa / vm. SOA"},
		{"db.vm.", dns.TypeMX, "NOERROR aa / vm. SOA"},
		{"nope.vm.", dns.TypeA, "NXDOMAIN aa / vm. SOA"},
		{"www.web.vm.", dns.TypeA, "NXDOMAIN aa / vm. SOA"},
		{"vm.", dns.TypeSOA, "NOERROR aa vm. SOA ..."},
		{"vm.", dns.TypeNS, "NOERROR aa vm. NS vm."},
		{"vm.", dns.TypeA, "NOERROR aa / vm. SOA"},
		{"2.0.30.172.in-addr.arpa.", dns.TypePTR, "NOERROR aa 2.0.30.172.in-addr.arpa. PTR web.vm."},
		{"9.0.30.172.in-addr.arpa.", dns.TypePTR, "NXDOMAIN aa / 30.172.in-addr.arpa. SOA"},
		{"0.30.172.in-addr.arpa.", dns.TypePTR, "NOERROR aa / 30.172.in-addr.arpa. SOA"},
		{"30.172.in-addr.arpa.", dns.TypeSOA, "NOERROR aa 30.172.in-addr.arpa. SOA ..."},
		{v6, dns.TypePTR, "NOERROR aa " + v6 + " PTR web.vm."},
		{"1.31.172.in-addr.arpa.", dns.TypePTR, "REFUSED"},
		{"example.com.", dns.TypeA, "REFUSED"},
		{"notvm.", dns.TypeA, "REFUSED"},
		{"x.notvm.", dns.TypeA, "REFUSED"},
		{".", dns.TypeNS, "REFUSED"},
		{"vm.", dns.TypeIXFR, "REFUSED"},
	} {
		for _, network := range []string{"udp", "tcp"} {
			if got := said(ask(t, network, server, c.name, c.qtype)); got != c.want {
				t.Errorf("%s %s over %s: %s, want %s", c.name, dns.TypeToString[c.qtype], network, got, c.want)
			}
		}
	}
	if soa, ok := ask(t, "udp", server, "nope.vm.", dns.TypeA).Ns[0].(*dns.SOA); !ok || soa.Minttl != negativeTTL || soa.Hdr.Ttl != negativeTTL {
		t.Errorf("negative answers live for %v", soa)
	}
}

func TestTransferIsRefused(t *testing.T) {
	_, server := serve(t, zone)
	got, err := new(dns.Transfer).In(new(dns.Msg).SetAxfr("vm."), server)
	if err != nil {
		t.Fatal(err)
	}
	for e := range got {
		if e.Error == nil || len(e.RR) > 0 {
			t.Errorf("transferred %v, %v", e.RR, e.Error)
		}
	}
}

func TestEDNS(t *testing.T) {
	_, server := serve(t, zone)
	m := new(dns.Msg).SetQuestion("web.vm.", dns.TypeA)
	m.SetEdns0(4096, true)
	c := dns.Client{Timeout: 10 * time.Second}
	reply, _, err := c.Exchange(m, server)
	if err != nil || reply.IsEdns0() == nil || reply.IsEdns0().UDPSize() != udpSize || !reply.IsEdns0().Do() {
		t.Errorf("got %v, %v", reply, err)
	}
	m.IsEdns0().SetVersion(1)
	reply, _, err = c.Exchange(m, server)
	if err != nil || reply.Rcode != dns.RcodeBadVers || len(reply.Answer) > 0 {
		t.Errorf("version 1: %v, %v", reply, err)
	}
	if reply := ask(t, "udp", server, "web.vm.", dns.TypeA); reply.IsEdns0() != nil {
		t.Errorf("an option that nobody asked for: %v", reply)
	}
}

func TestOtherMessages(t *testing.T) {
	_, server := serve(t, zone)
	exchange := func(patience time.Duration, change func(*dns.Msg)) *dns.Msg {
		t.Helper()
		m := new(dns.Msg).SetQuestion("web.vm.", dns.TypeA)
		change(m)
		conn, err := dns.DialTimeout("udp", server, time.Second)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if err := conn.WriteMsg(m); err != nil {
			t.Fatal(err)
		}
		conn.SetReadDeadline(time.Now().Add(patience))
		reply, err := conn.ReadMsg()
		if err != nil {
			return nil
		}
		return reply
	}
	for name, c := range map[string]struct {
		change func(*dns.Msg)
		rcode  int
	}{
		"update":        {func(m *dns.Msg) { m.Opcode = dns.OpcodeUpdate }, dns.RcodeNotImplemented},
		"notify":        {func(m *dns.Msg) { m.Opcode = dns.OpcodeNotify }, dns.RcodeNotImplemented},
		"two questions": {func(m *dns.Msg) { m.Question = append(m.Question, m.Question[0]) }, dns.RcodeFormatError},
		"no question":   {func(m *dns.Msg) { m.Question = nil }, dns.RcodeFormatError},
		"class chaos":   {func(m *dns.Msg) { m.Question[0].Qclass = dns.ClassCHAOS }, dns.RcodeRefused},
	} {
		if reply := exchange(10*time.Second, c.change); reply == nil || reply.Rcode != c.rcode || len(reply.Answer) > 0 {
			t.Errorf("%s: %v", name, reply)
		}
	}
	if reply := exchange(300*time.Millisecond, func(m *dns.Msg) { m.Response = true }); reply != nil {
		t.Errorf("an answer was answered: %v", reply)
	}
}

func TestRecordsComeAndGo(t *testing.T) {
	s, server := serve(t, zone)
	serial := func() uint32 { return ask(t, "udp", server, "vm.", dns.TypeSOA).Answer[0].(*dns.SOA).Serial }
	before := serial()
	if s.Records() != 2 {
		t.Errorf("%d records", s.Records())
	}
	s.Set(Zone{Hosts: zone.Hosts[1:], Subnets: zone.Subnets})
	if got := said(ask(t, "udp", server, "web.vm.", dns.TypeA)); got != "NXDOMAIN aa / vm. SOA" {
		t.Errorf("a VM that is gone: %s", got)
	}
	if got := said(ask(t, "udp", server, "2.0.30.172.in-addr.arpa.", dns.TypePTR)); got != "NXDOMAIN aa / 30.172.in-addr.arpa. SOA" {
		t.Errorf("the address of a VM that is gone: %s", got)
	}
	if after := serial(); after == before {
		t.Error("the serial stays")
	}
}

func TestReverseZones(t *testing.T) {
	for subnet, want := range map[string][]string{
		"172.30.0.0/16":    {"30.172.in-addr.arpa."},
		"10.1.2.0/24":      {"2.1.10.in-addr.arpa."},
		"10.1.254.0/23":    {"254.1.10.in-addr.arpa.", "255.1.10.in-addr.arpa."},
		"192.168.7.252/30": {"252.7.168.192.in-addr.arpa.", "253.7.168.192.in-addr.arpa.", "254.7.168.192.in-addr.arpa.", "255.7.168.192.in-addr.arpa."},
		"fd00:1::/32":      {"1.0.0.0.0.0.d.f.ip6.arpa."},
	} {
		if got := reverseOrigins(netip.MustParsePrefix(subnet)); !slices.Equal(got, want) {
			t.Errorf("%s: %q, want %q", subnet, got, want)
		}
	}
}

func TestTakenPort(t *testing.T) {
	s, server := serve(t, zone)
	_, err := s.Listen(netip.MustParseAddrPort(server))
	if fault.KindOf(err) != fault.Conflict || !strings.Contains(err.Error(), server) || fault.HintOf(err) == "" {
		t.Errorf("got %v", err)
	}
	_, err = s.Listen(netip.MustParseAddrPort("198.51.100.1:53"))
	if fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Errorf("an address of nobody's: %v", err)
	}
}

// A thousand askers at once, over both ways, while the zone changes under them.
func TestThousandParallelQueries(t *testing.T) {
	s, server := serve(t, zone)
	stop := make(chan struct{})
	var changes sync.WaitGroup
	changes.Go(func() {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return
			default:
				s.Set(Zone{Hosts: append(slices.Clone(zone.Hosts), Host{Name: fmt.Sprint("vm", i)}), Subnets: zone.Subnets})
				time.Sleep(time.Millisecond) // leaves the processors to the others
			}
		}
	})
	var g errgroup.Group
	for i := range 1000 {
		g.Go(func() error {
			network := "udp"
			if i%5 == 0 {
				network = "tcp"
			}
			c := dns.Client{Net: network, Timeout: 5 * time.Second}
			var reply *dns.Msg
			var err error
			for range 4 { // as resolvers do: the kernel drops packets of a burst
				if reply, _, err = c.Exchange(new(dns.Msg).SetQuestion("web.vm.", dns.TypeA), server); err == nil {
					break
				}
			}
			if err != nil {
				return err
			}
			if got := said(reply); got != "NOERROR aa web.vm. A 172.30.0.2" {
				return fmt.Errorf("answered %s", got)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	close(stop)
	changes.Wait()
}

// FuzzMessage: whatever comes over UDP, an answer is no larger than it may be, and the next question is answered.
func FuzzMessage(f *testing.F) {
	_, server := serve(f, zone)
	for _, m := range []*dns.Msg{new(dns.Msg).SetQuestion("web.vm.", dns.TypeA), new(dns.Msg).SetAxfr("vm."), new(dns.Msg).SetNotify("vm.")} {
		m.SetEdns0(512, true)
		packed, err := m.Pack()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(packed)
		f.Add(packed[:len(packed)-3])
	}
	f.Add([]byte{})
	f.Add([]byte("\x00\x01\x00\x00\x00\x01\x00\x00\x00\x00\x00\x00\xc0\x0c\x00\x01\x00\x01")) // a name that points at itself
	conn, err := net.Dial("udp", server)
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { conn.Close() })
	f.Fuzz(func(t *testing.T, packet []byte) {
		if len(packet) > 60000 {
			return
		}
		if _, err := conn.Write(packet); err != nil {
			t.Fatalf("%x is not taken: %v", packet, err)
		}
		if got := said(ask(t, "udp", server, "web.vm.", dns.TypeA)); got != "NOERROR aa web.vm. A 172.30.0.2" {
			t.Fatalf("after %x: %s", packet, got)
		}
		conn.SetReadDeadline(time.Now())
		answer := make([]byte, 1<<16)
		if n, err := conn.Read(answer); err == nil && n > udpSize {
			t.Fatalf("%d bytes in answer to %x", n, packet)
		}
	})
}

// upstream is a name server of the world, in this process.
func upstream(t *testing.T, address string, answer func(*dns.Msg) *dns.Msg) {
	t.Helper()
	handler := dns.HandlerFunc(func(w dns.ResponseWriter, m *dns.Msg) {
		if reply := answer(m); reply != nil {
			_ = w.WriteMsg(reply)
		}
	})
	udp, err := net.ListenPacket("udp", address)
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range []*dns.Server{{PacketConn: udp, Handler: handler}, {Listener: tcp, Handler: handler}} {
		started := make(chan struct{})
		s.NotifyStartedFunc = func() { close(started) }
		done := make(chan error, 1)
		go func() { done <- s.ActivateAndServe() }()
		<-started
		t.Cleanup(func() {
			_ = s.Shutdown()
			<-done
		})
	}
}

// world answers every A question with an address, and "big." with more than fits into a packet.
func world(address string) func(*dns.Msg) *dns.Msg {
	return func(m *dns.Msg) *dns.Msg {
		reply := new(dns.Msg).SetReply(m)
		reply.RecursionAvailable = true
		n := 1
		if m.Question[0].Name == "big." {
			n = 200
		}
		for range n {
			reply.Answer = append(reply.Answer, &dns.A{
				Hdr: dns.RR_Header{Name: m.Question[0].Name, Rrtype: dns.TypeA, Class: dns.ClassINET, Ttl: 60}, A: net.ParseIP(address),
			})
		}
		return reply
	}
}

// guests is a forwarder in a namespace with addresses of two guests and a stranger.
func guests(t *testing.T, resolv string) (ns *hosttest.NS, resolvConf string) {
	t.Helper()
	need.Root(t)
	ns = hosttest.NetNS(t)
	ns.Run(t, "ip", "link", "add", "br0", "type", "bridge")
	ns.Run(t, "ip", "link", "set", "br0", "up")
	for _, a := range []string{"172.30.0.1/16", "172.30.0.2/16", "172.30.1.3/16", "172.30.9.9/16", "198.51.100.1/24"} {
		ns.Run(t, "ip", "addr", "add", a, "dev", "br0")
	}
	resolvConf = filepath.Join(t.TempDir(), "resolv.conf")
	write(t, resolvConf, resolv)
	udp, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(172, 30, 0, 1), Port: 53})
	if err != nil {
		t.Fatal(err)
	}
	tcp, err := net.Listen("tcp", "172.30.0.1:53")
	if err != nil {
		t.Fatal(err)
	}
	s := New(quiet)
	s.Set(zone)
	f := s.Forward(udp, tcp, resolvConf)
	f.upstreams.dial = func(ctx context.Context, network, address string) (conn net.Conn, err error) {
		err = ns.Do(func() error {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, address)
			return err
		})
		return conn, err
	}
	t.Cleanup(func() {
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	})
	return ns, resolvConf
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// askFrom asks the forwarder from an address; nil is no answer.
func askFrom(t *testing.T, ns *hosttest.NS, network, from, name string) (reply *dns.Msg) {
	t.Helper()
	err := ns.Do(func() error {
		local := net.Addr(&net.UDPAddr{IP: net.ParseIP(from)})
		if network == "tcp" {
			local = &net.TCPAddr{IP: net.ParseIP(from)}
		}
		c := dns.Client{Net: network, Timeout: 6 * time.Second, Dialer: &net.Dialer{LocalAddr: local}}
		if from == "198.51.100.1" || from == "172.30.9.9" { // which is to get none
			c.Timeout = 300 * time.Millisecond
		}
		reply, _, _ = c.Exchange(new(dns.Msg).SetQuestion(name, dns.TypeA), "172.30.0.1:53")
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return reply
}

// A guest that asks while the daemon is about to answer has its answer, too.
func TestForwarderAnswersWhoWasFirst(t *testing.T) {
	tcp, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	udp, err := net.ListenUDP("udp", net.UDPAddrFromAddrPort(tcp.Addr().(*net.TCPAddr).AddrPort()))
	if err != nil {
		t.Fatal(err)
	}
	conn, err := dns.Dial("udp", udp.LocalAddr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.WriteMsg(new(dns.Msg).SetQuestion("web.vm.", dns.TypeA)); err != nil {
		t.Fatal(err)
	}
	s := New(quiet)
	s.Set(zone)
	f := s.Forward(udp, tcp, "/dev/null")
	_ = conn.SetReadDeadline(time.Now().Add(20 * time.Second))
	if reply, err := conn.ReadMsg(); err != nil || len(reply.Answer) != 1 {
		t.Errorf("%v, %v", reply, err)
	}
	if err := f.Close(); err != nil {
		t.Error(err)
	}
}

func TestForwarder(t *testing.T) {
	ns, resolvConf := guests(t, "nameserver 172.30.0.1\nnameserver 127.0.0.53\nsearch example\n")
	upstream(t, "127.0.0.53:53", world("203.0.113.5"))
	upstream(t, "127.0.0.54:53", world("203.0.113.6"))
	upstream(t, "127.0.0.55:53", func(m *dns.Msg) *dns.Msg { return new(dns.Msg).SetRcode(m, dns.RcodeServerFailure) })
	const web, db, nobody, stranger = "172.30.0.2", "172.30.1.3", "172.30.9.9", "198.51.100.1"
	want := func(network, from, name, want string) {
		t.Helper()
		got := "nothing"
		if reply := askFrom(t, ns, network, from, name); reply != nil {
			got = said(reply)
		}
		if got != want {
			t.Errorf("%s asks for %s over %s and gets %s, want %s", from, name, network, got, want)
		}
	}
	for _, network := range []string{"udp", "tcp"} {
		want(network, web, "db.vm.", "NOERROR aa db.vm. A 172.30.1.3")
		want(network, web, "nope.vm.", "NXDOMAIN aa / vm. SOA")
		want(network, web, "example.com.", "NOERROR example.com. A 203.0.113.5")
		want(network, db, "web.vm.", "NOERROR aa web.vm. A 172.30.0.2")
		want(network, db, "example.com.", "REFUSED") // it has no way out, and gets none through names
		want(network, nobody, "web.vm.", "nothing")
		want(network, stranger, "web.vm.", "nothing")
		want(network, "172.30.0.1", "web.vm.", "NOERROR aa web.vm. A 172.30.0.2")
	}
	if reply := askFrom(t, ns, "udp", web, "big."); reply == nil || !reply.Truncated || len(reply.Answer) >= 200 {
		t.Errorf("a long answer over UDP: %v", reply)
	}
	if reply := askFrom(t, ns, "tcp", web, "big."); reply == nil || reply.Truncated || len(reply.Answer) != 200 {
		t.Errorf("a long answer over TCP: %v", reply)
	}
	// A VPN comes up: the host asks others now. One that fails is passed over.
	time.Sleep(rereadPause)
	write(t, resolvConf, "nameserver 127.0.0.55\nnameserver 127.0.0.54\n")
	want("udp", web, "example.com.", "NOERROR example.com. A 203.0.113.6")
	time.Sleep(rereadPause)
	write(t, resolvConf, "# none\n")
	want("udp", web, "example.com.", "SERVFAIL")
}
