package daemon

import (
	"errors"
	"log/slog"
	"net"
	"os"
	"sync"
	"syscall"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
	"banger/internal/paths"
)

// listener is the daemon's socket. Its file is private to the user, and who connects must be the user or root.
type listener struct {
	*net.UnixListener
	path   string
	inode  os.FileInfo
	uid    uint32
	logger *slog.Logger
	once   sync.Once
}

// listen binds the socket; a file in its place is removed. The caller holds the daemon's lock, so
// no other daemon can be behind it.
func listen(path string, logger *slog.Logger) (*listener, error) {
	if err := paths.CheckSocket(path); err != nil {
		return nil, err
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fault.Wrap(fault.Precondition, err, "cannot remove the old socket")
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot listen on %s", path)
	}
	l.SetUnlinkOnClose(false) // it might be the socket of a listener that took this one's place
	if err := os.Chmod(path, 0o600); err != nil {
		_ = l.Close()
		return nil, fault.Wrap(fault.Precondition, err, "cannot make the socket private")
	}
	info, err := os.Lstat(path)
	if err != nil {
		_ = l.Close()
		return nil, fault.Wrap(fault.Precondition, err, "the socket vanished")
	}
	return &listener{UnixListener: l, path: path, inode: info, uid: uint32(os.Getuid()), logger: logger}, nil
}

// present tells whether the socket's file is still the one that was bound.
func (l *listener) present() bool {
	info, err := os.Lstat(l.path)
	return err == nil && os.SameFile(info, l.inode)
}

// Accept returns the next connection of the user or of root; others are closed.
func (l *listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.AcceptUnix()
		if err != nil {
			return nil, err
		}
		uid, err := peer(conn)
		if err == nil && (uid == l.uid || uid == 0) {
			return conn, nil
		}
		_ = conn.Close()
		l.logger.Warn("connection refused", "uid", uid, "error", err)
	}
}

// Close stops listening and removes the socket's file.
func (l *listener) Close() (err error) {
	l.once.Do(func() {
		if l.present() {
			_ = os.Remove(l.path) // a stale one does no harm: the next daemon removes it
		}
		err = l.UnixListener.Close()
	})
	return err
}

// peer returns the user at the other end of a connection (SO_PEERCRED, unix(7)).
func peer(conn syscall.Conn) (uint32, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	err = raw.Control(func(fd uintptr) { cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, credErr); err != nil {
		return 0, err
	}
	return cred.Uid, nil
}
