// Package sshd is the SSH server of a guest that brings none. It lets in whom the guest's own authorized_keys files
// name, by the host key that lies in the guest, both read anew for each connection: a copy of the guest gets others. It serves
// shells, programs, files (sftp) and forwarded ports; programs run as the agent runs those of the host.
package sshd

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/crypto/ssh"

	"banger/internal/agent/serve"
)

const (
	maxConnections   = 128
	handshakeTimeout = 30 * time.Second
	maxKeysFile      = 1 << 20
	hostKey          = "etc/ssh/ssh_host_ed25519_key"
	acceptPause      = 100 * time.Millisecond // after a failure that may pass
)

// Account is a user of the guest.
type Account struct{ Home, Shell string }

// Options is what the server needs of its surroundings.
type Options struct {
	Root    string // of the guest's files; "/"
	Runner  serve.Runner
	Account func(user string) (Account, error)
	// SFTP is the command that serves files on its standard input and output.
	SFTP []string
}

// Serve serves SSH on l until ctx ends or l fails. It closes l, and returns when all connections have ended.
func Serve(ctx context.Context, l net.Listener, o Options) error {
	ctx, cancel := context.WithCancel(ctx)
	var all sync.WaitGroup
	defer all.Wait()
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	free := make(chan struct{}, maxConnections)
	for {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, net.ErrClosed):
			return err
		case err != nil: // out of descriptors, a connection that was reset
			time.Sleep(acceptPause)
			continue
		}
		select {
		case free <- struct{}{}:
		default:
			_ = conn.Close()
			continue
		}
		all.Go(func() {
			defer func() { <-free }()
			o.connection(ctx, conn)
		})
	}
}

// connection serves one connection to its end.
func (o Options) connection(ctx context.Context, conn net.Conn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(ctx, func() { _ = conn.Close() })()
	config, err := o.config()
	if err != nil {
		fmt.Fprintf(os.Stderr, "banger: ssh: %v\n", err)
		_ = conn.Close()
		return
	}
	_ = conn.SetDeadline(time.Now().Add(handshakeTimeout)) // a connection that is gone fails the handshake
	client, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil { // a port scan, a stranger
		_ = conn.Close()
		return
	}
	_ = conn.SetDeadline(time.Time{})
	defer func() { _ = client.Close() }()
	c := &connected{Options: o, client: client, forwards: map[string]net.Listener{}}
	defer c.stopForwarding()
	var all sync.WaitGroup
	all.Go(func() { c.global(ctx, requests) })
	for asked := range channels {
		switch asked.ChannelType() {
		case "session":
			all.Go(func() { c.session(ctx, asked) })
		case "direct-tcpip":
			all.Go(func() { c.direct(ctx, asked) })
		default:
			_ = asked.Reject(ssh.UnknownChannelType, "no such channel")
		}
	}
	cancel()
	all.Wait()
}

func (o Options) config() (*ssh.ServerConfig, error) {
	pem, err := os.ReadFile(filepath.Join(o.Root, hostKey))
	if err != nil {
		return nil, err
	}
	key, err := ssh.ParsePrivateKey(pem)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", hostKey, err)
	}
	config := &ssh.ServerConfig{MaxAuthTries: 6, PublicKeyCallback: o.admit, ServerVersion: "SSH-2.0-banger"}
	config.AddHostKey(key)
	return config, nil
}

var errStranger = errors.New("no such key")

// admit lets a key in that its user's authorized_keys names. Options before a key, which restrict what it may do,
// are not understood: such a key is not let in.
func (o Options) admit(conn ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
	a, err := o.Account(conn.User())
	if err != nil {
		return nil, errStranger
	}
	f, err := os.Open(filepath.Join(o.Root, a.Home, ".ssh/authorized_keys"))
	if err != nil {
		return nil, errStranger
	}
	defer func() { _ = f.Close() }()
	wanted := key.Marshal()
	for lines := bufio.NewScanner(io.LimitReader(f, maxKeysFile)); lines.Scan(); {
		known, _, options, _, err := ssh.ParseAuthorizedKey(lines.Bytes())
		if err == nil && len(options) == 0 && bytes.Equal(known.Marshal(), wanted) {
			return nil, nil
		}
	}
	return nil, errStranger
}
