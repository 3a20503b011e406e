package bench

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"time"

	"golang.org/x/net/dns/dnsmessage"
	"golang.org/x/sync/errgroup"

	"banger/internal/dns"
)

const (
	nameRecords  = 1000
	nameRate     = 5000 // questions a second, of all askers
	nameAskers   = 20
	nameDuration = 4 * time.Second
)

// names asks the server of names at a steady rate, as many resolvers do, and in turns a server that only sends packets
// back: what that takes is the machine's part.
func (b *bench) names(ctx context.Context) error {
	server := dns.New(slog.New(slog.DiscardHandler))
	zone := dns.Zone{Subnets: []netip.Prefix{netip.MustParsePrefix("172.30.0.0/16")}}
	address := netip.MustParseAddr("172.30.0.1")
	for i := range nameRecords {
		address = address.Next()
		zone.Hosts = append(zone.Hosts, dns.Host{Name: fmt.Sprintf("vm%d", i), Addresses: []netip.Addr{address}})
	}
	server.Set(zone)
	l, err := server.Listen(netip.MustParseAddrPort("127.0.0.1:0"))
	if err != nil {
		return err
	}
	defer l.Close()
	echo, err := net.ListenUDP("udp", &net.UDPAddr{IP: net.IPv4(127, 0, 0, 1)})
	if err != nil {
		return err
	}
	defer echo.Close()
	go sendBack(echo)

	var plain, named []float64
	for range b.rounds {
		p, err := ask(ctx, echo.LocalAddr().String(), func(packet []byte) error { return new(dnsmessage.Message).Unpack(packet) })
		if err != nil {
			return err
		}
		n, err := ask(ctx, l.Address().String(), answered)
		if err != nil {
			return err
		}
		plain, named = append(plain, float64(percentile(p, 99))), append(named, float64(percentile(n, 99)))
	}
	what := fmt.Sprintf("at %d/s, 99th percentile", nameRate)
	base := b.add(measured("UDP echo "+what, "ms", 0, plain...))
	b.add(measured(fmt.Sprintf("DNS with %d names %s", nameRecords, what), "ms", 1, named...))
	b.add(measured("the same, to the echo", "ms", 0, named...).against(base, 3))
	return nil
}

// sendBack returns packets until its socket is closed.
func sendBack(conn *net.UDPConn) {
	packet := make([]byte, 512)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(packet)
		if err != nil {
			return
		}
		_, _ = conn.WriteToUDPAddrPort(packet[:n], from) // one that is lost is seen by who waits for it
	}
}

// ask returns how long each answer took, in milliseconds.
func ask(ctx context.Context, server string, check func(answer []byte) error) ([]float64, error) {
	all := make([][]float64, nameAskers)
	group, ctx := errgroup.WithContext(ctx)
	for i := range nameAskers {
		group.Go(func() (err error) {
			all[i], err = askSteadily(ctx, server, i, check)
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return nil, err
	}
	var took []float64
	for _, t := range all {
		took = append(took, t...)
	}
	return took, nil
}

// askSteadily asks at its part of the rate, beginning at its part of the period.
func askSteadily(ctx context.Context, server string, asker int, check func(answer []byte) error) ([]float64, error) {
	conn, err := net.Dial("udp", server)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	const period = time.Second * nameAskers / nameRate
	if err := rest(ctx, period*time.Duration(asker)/nameAskers); err != nil {
		return nil, err
	}
	tick := time.NewTicker(period)
	defer tick.Stop()
	var took []float64
	answer := make([]byte, 2048)
	for n := range int(nameDuration / period) {
		question, err := question(uint16(n), fmt.Sprintf("vm%d.vm.", (asker*37+n)%nameRecords))
		if err != nil {
			return nil, err
		}
		begin := time.Now()
		if err := conn.SetDeadline(begin.Add(5 * time.Second)); err != nil {
			return nil, err
		}
		if _, err := conn.Write(question); err != nil {
			return nil, err
		}
		size, err := conn.Read(answer)
		if err != nil {
			return nil, err
		}
		took = append(took, time.Since(begin).Seconds()*1000)
		if err := check(answer[:size]); err != nil {
			return nil, err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	return took, nil
}

func question(id uint16, name string) ([]byte, error) {
	n, err := dnsmessage.NewName(name)
	if err != nil {
		return nil, err
	}
	m := dnsmessage.Message{
		Header:    dnsmessage.Header{ID: id},
		Questions: []dnsmessage.Question{{Name: n, Type: dnsmessage.TypeA, Class: dnsmessage.ClassINET}},
	}
	return m.Pack()
}

// answered wants an answer with an address.
func answered(packet []byte) error {
	var m dnsmessage.Message
	if err := m.Unpack(packet); err != nil {
		return err
	}
	if m.RCode != dnsmessage.RCodeSuccess || len(m.Answers) != 1 {
		return errors.New("a name was not answered: " + m.GoString())
	}
	return nil
}
