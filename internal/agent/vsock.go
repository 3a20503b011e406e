package agent

import (
	"fmt"
	"net"

	"github.com/mdlayher/vsock"
	"golang.org/x/sys/unix"
)

// listenVsock listens for the host on a vsock port.
func listenVsock(port uint32) (net.Listener, error) {
	l, err := vsock.ListenContextID(unix.VMADDR_CID_ANY, port, nil)
	if err != nil {
		return nil, fmt.Errorf("listen on the guest channel: %w", err)
	}
	return hostOnly{l}, nil
}

// hostOnly drops connections that come from the guest itself: any program may ask for the loop back, and the agent
// does what it is told as root.
type hostOnly struct{ net.Listener }

// Accept returns the next connection of the host.
func (l hostOnly) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if from, ok := conn.RemoteAddr().(*vsock.Addr); ok && from.ContextID == vsock.Host {
			return conn, nil
		}
		_ = conn.Close() // nobody to tell
	}
}
