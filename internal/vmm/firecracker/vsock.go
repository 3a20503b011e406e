package firecracker

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"syscall"
	"time"

	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
)

// Bounds of connecting to the guest. Before the guest's driver is up, and while it is paused, Firecracker accepts
// and then says nothing at all; where nobody listens in the guest it hangs up.
const (
	answerFirst = 250 * time.Millisecond // how long an answer is waited for
	answerMost  = 4 * time.Second
	retryFirst  = 5 * time.Millisecond // between two attempts
	retryMost   = 100 * time.Millisecond

	maxOK = 32 // bytes of the answer's line
)

// errNotYet is a guest that does not answer now, and may later.
var errNotYet = errors.New("the guest does not answer on its vsock")

// dialGuest connects to the agent of the machine in dir, and waits for it until ctx ends or nobody listens for
// connections in dir any more.
func dialGuest(ctx context.Context, dir string) (net.Conn, error) {
	wait, pause := answerFirst, retryFirst
	for {
		conn, err := connectGuest(ctx, dir, wait)
		switch {
		case err == nil:
			return conn, nil
		case ctx.Err() != nil:
			return nil, fault.Wrap(fault.KindOf(ctx.Err()), ctx.Err(), "the guest does not answer on its vsock")
		case errors.Is(err, os.ErrDeadlineExceeded):
			wait = min(2*wait, answerMost)
		case !errors.Is(err, errNotYet):
			return nil, err
		}
		select {
		case <-time.After(pause):
			pause = min(2*pause, retryMost)
		case <-ctx.Done():
		}
	}
}

// connectGuest makes one attempt. Firecracker reads the request without waiting for more of it, so it goes out whole.
func connectGuest(ctx context.Context, dir string, wait time.Duration) (_ net.Conn, err error) {
	conn, err := system.DialUnixIn(ctx, dir, vmm.GuestSocket)
	if errors.Is(err, syscall.EAGAIN) { // attempts given up have not been accepted yet
		return nil, errNotYet
	}
	if err != nil {
		return nil, fault.Wrap(fault.KindOf(err), err, "the guest channel is not there")
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer func() {
		if !stop() && err == nil {
			err = ctx.Err()
		}
		if err != nil {
			conn.Close()
		}
	}()
	if err := conn.SetDeadline(time.Now().Add(wait)); err != nil {
		return nil, err
	}
	if _, err := fmt.Fprintf(conn, "CONNECT %d\n", vmm.VsockPort); err != nil {
		return nil, notYet(err)
	}
	line, err := readLine(conn)
	if err != nil {
		return nil, notYet(err)
	}
	if !okPattern.MatchString(line) {
		return nil, fault.New(fault.Unexpected, "the guest channel answers with %q, which is not Firecracker's", line)
	}
	return conn, conn.SetDeadline(time.Time{})
}

var okPattern = regexp.MustCompile(`^OK \d{1,10}\n$`)

// notYet keeps the end of the time and turns the end of a connection into errNotYet.
func notYet(err error) error {
	if hungUp(err) {
		return errNotYet
	}
	return err
}

// readLine reads to the end of a line and not a byte further: what follows is the agent's. A line that is too long
// is returned without its end.
func readLine(r io.Reader) (string, error) {
	line, one := make([]byte, 0, maxOK), make([]byte, 1)
	for len(line) < maxOK {
		if _, err := io.ReadFull(r, one); err != nil {
			return "", err
		}
		line = append(line, one[0])
		if one[0] == '\n' {
			break
		}
	}
	return string(line), nil
}
