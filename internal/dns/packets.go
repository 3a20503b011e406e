package dns

import (
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"net/netip"
	"time"

	"github.com/miekg/dns"
)

// readPause follows a packet that could not be read: nothing spins.
const readPause = 10 * time.Millisecond

// writer takes the answer to one message; a dns.ResponseWriter is one.
type writer interface {
	RemoteAddr() net.Addr
	WriteMsg(*dns.Msg) error
	Close() error
}

// handler answers one message. Over UDP it waits for nobody.
type handler func(w writer, m *dns.Msg)

// packets answers what comes over UDP, one packet at a time, until the socket is closed: an answer takes microseconds,
// less than to hand it to a goroutine, and a flood finds nothing to pile up in.
func (s *Server) packets(conn *net.UDPConn, handle handler) {
	buffer := make([]byte, maxQuestion)
	for {
		n, from, err := conn.ReadFromUDPAddrPort(buffer)
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil {
			time.Sleep(readPause)
			continue
		}
		s.packet(&packetWriter{conn, from}, bytes.Clone(buffer[:n]), handle)
	}
}

// headerSize is that of a message (RFC 1035 4.1.1).
const headerSize = 12

// packet answers one packet.
func (s *Server) packet(w writer, packet []byte, handle handler) {
	if len(packet) < headerSize {
		return
	}
	field := func(i int) uint16 { return binary.BigEndian.Uint16(packet[2*i:]) }
	h := dns.Header{Id: field(0), Bits: field(1), Qdcount: field(2), Ancount: field(3), Nscount: field(4), Arcount: field(5)}
	refuse := func(rcode int) {
		reply := &dns.Msg{MsgHdr: dns.MsgHdr{Id: h.Id, Response: true, Opcode: int(h.Bits>>11) & 0xf, Rcode: rcode}}
		_ = w.WriteMsg(reply) // an asker that is gone needs no answer
	}
	switch accept(h) {
	case dns.MsgIgnore:
		return
	case dns.MsgReject:
		refuse(dns.RcodeFormatError)
		return
	case dns.MsgRejectNotImplemented:
		refuse(dns.RcodeNotImplemented)
		return
	}
	m := new(dns.Msg)
	if err := m.Unpack(packet); err != nil || len(m.Question) != 1 {
		refuse(dns.RcodeFormatError)
		return
	}
	s.guard(w, m, handle)
}

// packetWriter answers one packet.
type packetWriter struct {
	conn *net.UDPConn
	from netip.AddrPort
}

func (w *packetWriter) RemoteAddr() net.Addr { return net.UDPAddrFromAddrPort(w.from) }
func (w *packetWriter) Close() error         { return nil }

func (w *packetWriter) WriteMsg(m *dns.Msg) error {
	packed, err := m.Pack()
	if err != nil {
		return err
	}
	_, err = w.conn.WriteToUDPAddrPort(packed, w.from)
	return err
}
