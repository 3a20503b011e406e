package fakeguest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"banger/internal/agent/serve"
)

// Ports on which a fake guest listens.
const (
	EchoPort = 7  // it sends back what it gets (RFC 862)
	sshPort  = 22 // a banner, and no more
)

// dial connects to one of the fake guest's services.
func dial(_ context.Context, port uint16) (serve.Conn, string, error) {
	if port != EchoPort && port != sshPort {
		return nil, "", &net.OpError{Op: "dial", Net: "tcp", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	near, far, err := socketPair()
	if err != nil {
		return nil, "", err
	}
	go func() {
		defer far.Close()
		if port == sshPort {
			fmt.Fprint(far, "SSH-2.0-fake\r\n")
			return
		}
		_, _ = io.Copy(far, far)
		_ = far.CloseWrite() // the other side may be gone
	}()
	return near, fmt.Sprintf("127.0.0.1:%d", port), nil
}

// socketPair returns two ends of a connection.
func socketPair() (a, b *net.UnixConn, err error) {
	fds, err := syscall.Socketpair(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	a, err1 := unixConn(fds[0])
	b, err2 := unixConn(fds[1])
	return a, b, errors.Join(err1, err2)
}

func unixConn(fd int) (*net.UnixConn, error) {
	f := os.NewFile(uintptr(fd), "pair")
	defer f.Close()
	conn, err := net.FileConn(f)
	if err != nil {
		return nil, err
	}
	return conn.(*net.UnixConn), nil
}
