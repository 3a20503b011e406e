package hostnet

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
)

// OpListenDNS asks for sockets on port 53 of the bridge's address, a UDP and a TCP one, in that order. Request field:
// Address, as given to OpEnsureBridge. The response tells in Sockets that they follow: one byte that carries them as
// SCM_RIGHTS (unix(7)).
const OpListenDNS Op = "listen_dns"

// DNSPort is where guests ask for names.
const DNSPort = 53

// dnsSockets is how many OpListenDNS gives.
const dnsSockets = 2

// ListenDNS returns sockets that listen on port 53 of the bridge's address, which EnsureBridge returned. A Conflict
// fault says that something else listens there.
func (c *Client) ListenDNS(ctx context.Context, address netip.Prefix) (*net.UDPConn, net.Listener, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	response, err := c.ask(ctx, Request{Op: OpListenDNS, Address: address})
	if err != nil {
		return nil, nil, err
	}
	defer closeAll(response.files)
	if len(response.files) != dnsSockets {
		return nil, nil, fault.New(fault.Unexpected, "banger-nethelper gave %d sockets for DNS, not %d", len(response.files), dnsSockets)
	}
	udp, err := net.FilePacketConn(response.files[0])
	if err != nil {
		return nil, nil, fmt.Errorf("use a socket for DNS: %w", err)
	}
	tcp, err := net.FileListener(response.files[1])
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("use a socket for DNS: %w", err), udp.Close())
	}
	conn, ok := udp.(*net.UDPConn)
	if !ok {
		return nil, nil, errors.Join(fault.New(fault.Unexpected, "banger-nethelper gave something else than a UDP socket"), udp.Close(), tcp.Close())
	}
	return conn, tcp, nil
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // a copy of the descriptor goes on
	}
}

// SendSockets sends the sockets that a response tells of, and closes them here.
func SendSockets(socket syscall.Conn, files []*os.File) error {
	defer closeAll(files)
	fds := make([]int, len(files))
	for i, f := range files {
		fds[i] = int(f.Fd())
	}
	raw, err := socket.SyscallConn()
	if err != nil {
		return err
	}
	var sendErr error
	err = raw.Write(func(fd uintptr) bool {
		sendErr = unix.Sendmsg(int(fd), []byte{0}, unix.UnixRights(fds...), nil, unix.MSG_NOSIGNAL)
		return !errors.Is(sendErr, unix.EAGAIN)
	})
	return errors.Join(err, sendErr)
}

// receiveSockets reads what SendSockets sent. Descriptors beyond n are closed, and an error.
func receiveSockets(conn net.Conn, n int) ([]*os.File, error) {
	socket, ok := conn.(*net.UnixConn)
	if !ok || n > dnsSockets {
		return nil, fmt.Errorf("banger-nethelper tells of %d sockets", n)
	}
	oob := make([]byte, unix.CmsgSpace(dnsSockets*4)) // four bytes for each descriptor
	_, oobn, flags, _, err := socket.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return nil, fmt.Errorf("receive sockets: %w", err)
	}
	messages, err := unix.ParseSocketControlMessage(oob[:oobn])
	if err != nil {
		return nil, fmt.Errorf("receive sockets: %w", err)
	}
	var files []*os.File
	for i := range messages {
		fds, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			closeAll(files)
			return nil, fmt.Errorf("receive sockets: %w", err)
		}
		for _, fd := range fds {
			unix.CloseOnExec(fd)
			files = append(files, os.NewFile(uintptr(fd), "socket"))
		}
	}
	if len(files) != n || flags&unix.MSG_CTRUNC != 0 {
		closeAll(files)
		return nil, fmt.Errorf("received %d sockets instead of %d", len(files), n)
	}
	return files, nil
}

// WithSockets is a response that is followed by sockets.
func WithSockets(files ...*os.File) Response { return Response{Sockets: len(files), files: files} }

// Files returns the sockets that follow a response, for SendSockets.
func (r Response) Files() []*os.File { return r.files }

// ListenDNSOn binds the sockets of OpListenDNS. The one who calls it needs CAP_NET_BIND_SERVICE.
func ListenDNSOn(address netip.Addr) (Response, error) {
	at := netip.AddrPortFrom(address, DNSPort)
	udp, tcp, err := bind(at)
	if err != nil {
		return Response{}, listenFault(at, err)
	}
	defer udp.Close()
	defer tcp.Close()
	first, err := udp.File()
	if err != nil {
		return Response{}, err
	}
	second, err := tcp.File()
	if err != nil {
		return Response{}, errors.Join(err, first.Close())
	}
	return WithSockets(first, second), nil
}

func bind(at netip.AddrPort) (*net.UDPConn, *net.TCPListener, error) {
	udp, err := net.ListenUDP("udp4", net.UDPAddrFromAddrPort(at))
	if err != nil {
		return nil, nil, err
	}
	tcp, err := net.ListenTCP("tcp4", net.TCPAddrFromAddrPort(at))
	if err != nil {
		return nil, nil, errors.Join(err, udp.Close())
	}
	return udp, tcp, nil
}

func listenFault(at netip.AddrPort, err error) error {
	if !errors.Is(err, syscall.EADDRINUSE) {
		return fmt.Errorf("listen on %s: %w", at, err)
	}
	return fault.Wrap(fault.Conflict, err, "another name server listens on %s", at).
		WithHint("keep it off the bridge; dnsmasq: bind-dynamic and except-interface; see: ss -lnp 'sport = :53'")
}
