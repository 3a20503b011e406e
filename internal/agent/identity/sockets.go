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
		if err := netlink.SocketDestroy(c.local, c.remote); err != nil { // perhaps it has ended meanwhile
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
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
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

// Of enum tcp_states (include/net/tcp_states.h): sockets in these have nobody to tell.
const (
	tcpTimeWait = "06"
	tcpClosed   = "07"
	tcpListen   = "0A"
)

// connections reads a table of sockets (Documentation/networking/proc_net_tcp.rst). IPv6 addresses that are not
// mapped IPv4 ones are left out: guests have no IPv6 but on the link, which the kernel ends with it.
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

// address reads "0100007F:1F90": words of the host's byte order, and a port. nil when it is none of IPv4.
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
	if ip = ip.To4(); ip == nil {
		return nil
	}
	return &net.TCPAddr{IP: ip, Port: int(number)}
}
