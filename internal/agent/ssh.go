package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"
	"time"

	"github.com/pkg/sftp"

	"banger/internal/agent/boot"
	"banger/internal/agent/run"
	"banger/internal/agent/sshd"
)

const (
	sshPort = 22
	// sshGrace is how long an init that is not systemd may take to start a server of the image's own.
	sshGrace = 20 * time.Second
	sshPoll  = 250 * time.Millisecond
)

// sshServers are where images have servers of their own.
var sshServers = []string{"/usr/sbin/sshd", "/usr/bin/sshd", "/usr/local/sbin/sshd", "/usr/sbin/dropbear"}

// serveSSH serves SSH where the image has nobody who does, until ctx ends.
func serveSSH(ctx context.Context, runner run.Runner) {
	if !awaitOwnSSH(ctx) {
		return
	}
	l, err := net.Listen("tcp", fmt.Sprintf(":%d", sshPort))
	if err != nil {
		if !errors.Is(err, syscall.EADDRINUSE) { // else somebody was quicker
			fmt.Fprintf(os.Stderr, "banger: ssh: %v\n", err)
		}
		return
	}
	err = sshd.Serve(ctx, l, sshd.Options{
		Root: "/", Runner: runner, SFTP: []string{boot.AgentPath, "sftp"},
		Account: func(user string) (sshd.Account, error) {
			home, shell, err := runner.Account(user)
			return sshd.Account{Home: home, Shell: shell}, err
		},
	})
	if err != nil {
		fmt.Fprintf(os.Stderr, "banger: ssh: %v\n", err)
	}
}

// awaitOwnSSH tells whether it is for us to serve SSH: at once when the image has no server, or no init that could start
// it; when the init is another than systemd, after some time in which nobody listened.
func awaitOwnSSH(ctx context.Context) bool {
	kind := firstProcess()
	if kind == supervisor || !hasAny(sshServers) {
		return true
	}
	if kind == systemd {
		return false
	}
	for end := time.Now().Add(sshGrace); time.Now().Before(end); {
		if listening(read("/proc/net/tcp"), sshPort) || listening(read("/proc/net/tcp6"), sshPort) {
			return false
		}
		select {
		case <-ctx.Done():
			return false
		case <-time.After(sshPoll):
		}
	}
	return true
}

func hasAny(programs []string) bool {
	for _, p := range programs {
		if info, err := os.Stat(p); err == nil && info.Mode().IsRegular() {
			return true
		}
	}
	return false
}

// serveSFTP serves files on the standard streams, for the one who runs it.
func serveSFTP() error {
	home, err := os.Getwd()
	if err != nil {
		home = "/"
	}
	server, err := sftp.NewServer(standardStreams{}, sftp.WithServerWorkingDirectory(home))
	if err != nil {
		return err
	}
	err = server.Serve()
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return errors.Join(err, server.Close())
}

type standardStreams struct{}

func (standardStreams) Read(b []byte) (int, error)  { return os.Stdin.Read(b) }
func (standardStreams) Write(b []byte) (int, error) { return os.Stdout.Write(b) }
func (standardStreams) Close() error                { return os.Stdin.Close() }
