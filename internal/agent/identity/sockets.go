package identity

import (
	"bufio"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// HangUp ends the TCP connections over the network that a guest had before it became another one: their programs are
// told at once, instead of waiting for answers that go to another machine. Those within the guest and those that
// listen stay. The interfaces must be down: a reset that went out would end the connections of whom it was copied from.
func HangUp() error {
	all, err := allConnections()
	if err != nil || len(all) == 0 {
		return err
	}
	var why error
	for _, c := range all {
		if err := c.destroy(); err != nil { // perhaps it has ended meanwhile
			why = fmt.Errorf("end the connection from %s to %s: %w", c.local, c.remote, err)
		}
	}
	if why == nil {
		return nil
	}
	if all, err = allConnections(); err != nil || len(all) == 0 {
		return err
	}
	return why
}

// ReadyToHangUp has the kernel load what HangUp needs, so that a restored guest need not. What a kernel has not got
// HangUp tells.
func ReadyToHangUp() { _, _ = netlink.SocketDiagTCP(unix.AF_INET) }

func allConnections() ([]connection, error) {
	var all []connection
	for _, table := range []string{"/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"} {
		b, err := os.ReadFile(table)
		if errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			continue
		}
		if err != nil {
			return nil, err
		}
		all = append(all, connections(string(b))...)
	}
	return all, nil
}

type connection struct{ local, remote *net.TCPAddr }

// onLink tells whether its addresses hold on one link only.
func (c connection) onLink() bool { return c.local.IP.To4() == nil && c.local.IP.IsLinkLocalUnicast() }

// destroy has the kernel reset the connection.
func (c connection) destroy() error {
	if !c.onLink() {
		return destroyRequest{c, 0}.execute()
	}
	links, err := net.Interfaces() // the table does not tell on which
	if err != nil {
		return err
	}
	for _, l := range links {
		if err = (destroyRequest{c, l.Index}).execute(); err == nil {
			return nil
		}
	}
	return err
}

// destroyRequest is a struct inet_diag_req_v2 (include/uapi/linux/inet_diag.h).
type destroyRequest struct {
	connection
	link int // 0: it is bound to none
}

func (r destroyRequest) execute() error {
	n := nl.NewNetlinkRequest(nl.SOCK_DESTROY, unix.NLM_F_ACK)
	n.AddData(r)
	_, err := n.Execute(unix.NETLINK_INET_DIAG, 0)
	return err
}

// Len is the size of the struct.
func (r destroyRequest) Len() int { return 56 }

// Serialize is the struct.
func (r destroyRequest) Serialize() []byte {
	family, local, remote := byte(unix.AF_INET), r.local.IP.To4(), r.remote.IP.To4()
	if local == nil || remote == nil {
		family, local, remote = unix.AF_INET6, r.local.IP.To16(), r.remote.IP.To16()
	}
	b := make([]byte, r.Len())
	b[0], b[1] = family, unix.IPPROTO_TCP
	binary.BigEndian.PutUint16(b[8:], uint16(r.local.Port))
	binary.BigEndian.PutUint16(b[10:], uint16(r.remote.Port))
	copy(b[12:28], local)
	copy(b[28:44], remote)
	binary.NativeEndian.PutUint32(b[44:], uint32(r.link))
	for i := 48; i < 56; i++ { // no cookie: whichever it is
		b[i] = 0xff
	}
	return b
}

// Of enum tcp_states (include/net/tcp_states.h): sockets in these have nobody to tell.
const (
	tcpTimeWait = "06"
	tcpClosed   = "07"
	tcpListen   = "0A"
)

// connections reads a table of sockets (Documentation/networking/proc_net_tcp.rst).
func connections(table string) []connection {
	var all []connection
	for lines := bufio.NewScanner(strings.NewReader(table)); lines.Scan(); {
		f := strings.Fields(lines.Text())
		if len(f) < 4 || f[3] == tcpListen || f[3] == tcpClosed || f[3] == tcpTimeWait {
			continue
		}
		local, remote := address(f[1]), address(f[2])
		if local == nil || remote == nil || local.IP.IsLoopback() {
			continue
		}
		all = append(all, connection{local, remote})
	}
	return all
}

// address reads "0100007F:1F90": words of the host's byte order, and a port. nil when it is none.
func address(text string) *net.TCPAddr {
	host, port, _ := strings.Cut(text, ":")
	raw, err1 := hex.DecodeString(host)
	number, err2 := strconv.ParseUint(port, 16, 16)
	if err1 != nil || err2 != nil || len(raw) != net.IPv4len && len(raw) != net.IPv6len {
		return nil
	}
	ip := make(net.IP, 0, len(raw))
	for at := 0; at < len(raw); at += 4 {
		ip = binary.NativeEndian.AppendUint32(ip, binary.BigEndian.Uint32(raw[at:]))
	}
	return &net.TCPAddr{IP: ip, Port: int(number)}
}
