package builder

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strings"
	"time"

	"al.essio.dev/pkg/shellescape"
	"golang.org/x/crypto/ssh"

	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/vm"
)

const (
	sshWait    = 3 * time.Minute // for the server to answer, from when the VM runs
	sshAttempt = 10 * time.Second
	sshPause   = 200 * time.Millisecond
	endPause   = 5 * time.Second // for a killed script's end to be told
)

// ciphers begin with the one that a processor has instructions for, which also software emulation is quick with.
var ciphers = []string{"aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "chacha20-poly1305@openssh.com", "aes128-ctr", "aes256-ctr"}

// guest is the temporary VM as seen over SSH.
type guest struct {
	client *ssh.Client
	log    *buildLog
	name   string
	env    string // assignments in front of each step that needs the internet
}

// connect waits for the VM's SSH server. Only the host key that the VM was given is accepted.
func (b *Builder) connect(ctx context.Context, v vm.VM, log *buildLog) (*guest, error) {
	config, err := b.sshConfig(v)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, sshWait)
	defer cancel()
	address := netip.AddrPortFrom(v.IP, 22).String()
	for {
		client, err := dialSSH(ctx, address, config)
		if err == nil {
			return &guest{client: client, log: log, name: v.Spec.Name}, nil
		}
		pause := time.NewTimer(sshPause)
		select {
		case <-pause.C:
		case <-ctx.Done():
			pause.Stop()
			if fault.KindOf(ctx.Err()) == fault.Interrupted {
				return nil, ctx.Err()
			}
			return nil, fault.Wrap(fault.Timeout, err, "the SSH server of VM %s did not answer within %s", v.Spec.Name, sshWait)
		}
	}
}

func (b *Builder) sshConfig(v vm.VM) (*ssh.ClientConfig, error) {
	private, err := os.ReadFile(b.o.Paths.SSHKey())
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot read banger's SSH key")
	}
	signer, err := ssh.ParsePrivateKey(private)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot use banger's SSH key")
	}
	public, err := os.ReadFile(filepath.Join(b.o.Paths.VM(v.ID), paths.SSHHostKeyPub))
	if err != nil {
		return nil, fault.Wrap(fault.Unexpected, err, "VM %s has no host key", v.Spec.Name)
	}
	host, _, _, _, err := ssh.ParseAuthorizedKey(public)
	if err != nil {
		return nil, fault.Wrap(fault.Unexpected, err, "VM %s has no host key", v.Spec.Name)
	}
	return &ssh.ClientConfig{
		User: "root", Auth: []ssh.AuthMethod{ssh.PublicKeys(signer)}, HostKeyCallback: ssh.FixedHostKey(host),
		HostKeyAlgorithms: []string{host.Type()}, Config: ssh.Config{Ciphers: ciphers},
	}, nil
}

func dialSSH(ctx context.Context, address string, config *ssh.ClientConfig) (*ssh.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, sshAttempt)
	defer cancel()
	conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Now()) })()
	c, channels, requests, err := ssh.NewClientConn(conn, address, config)
	if err != nil {
		return nil, errors.Join(err, conn.Close())
	}
	return ssh.NewClient(c, channels, requests), nil
}

// Close ends the connection.
func (g *guest) Close() error { return g.client.Close() }

// run runs a shell line; its output goes to the log. An exit code is an *ssh.ExitError.
func (g *guest) run(ctx context.Context, line string, stdin io.Reader) error {
	return g.runTo(ctx, line, stdin, g.log)
}

func (g *guest) runTo(ctx context.Context, line string, stdin io.Reader, out io.Writer) error {
	session, err := g.client.NewSession()
	if err != nil {
		return fault.Wrap(fault.Unexpected, err, "the SSH connection to VM %s broke", g.name)
	}
	defer func() { _ = session.Close() }()
	full := make(chan error, 1)
	session.Stdin, session.Stdout, session.Stderr = stdin, &telling{out, full}, g.log
	done := make(chan error, 1)
	go func() { done <- session.Run(line) }()
	why := ctx.Err
	select {
	case err := <-done:
		return err
	case err := <-full: // nobody reads on: the program would wait for ever
		why = func() error { return err }
	case <-ctx.Done():
	}
	_ = session.Signal(ssh.SIGKILL) // the connection's end does the rest
	_ = session.Close()
	select {
	case <-done:
	case <-time.After(endPause):
	}
	return why()
}

// telling passes on why a write failed, the first time.
type telling struct {
	w    io.Writer
	full chan<- error
}

func (t *telling) Write(p []byte) (int, error) {
	n, err := t.w.Write(p)
	if err != nil {
		select {
		case t.full <- err:
		default:
		}
	}
	return n, err
}

// output runs a shell line and returns what it wrote.
func (g *guest) output(ctx context.Context, line string) (string, error) {
	var out bytes.Buffer
	err := g.runTo(ctx, line, nil, &out)
	return strings.TrimSpace(out.String()), err
}

// put writes a file, by way of a new one beside it, so that a half-written one is never seen.
func (g *guest) put(ctx context.Context, path, mode, owner string, content io.Reader) error {
	p, t, d := shellescape.Quote(path), shellescape.Quote(path+".banger-new"), shellescape.Quote(filepath.Dir(path))
	line := fmt.Sprintf("test ! -d %s || { echo 'it is a directory' >&2; exit 1; }; ", p) +
		fmt.Sprintf("umask 022 && mkdir -p %s && cat >%s && chown %s %s && chmod %s %s && mv -f %s %s", d, t, shellescape.Quote(owner), t, mode, t, t, p)
	g.log.begin(nil)
	if err := g.run(ctx, line, content); err != nil {
		if said := g.log.end(); len(said) > 0 {
			err = errors.New(said[len(said)-1])
		}
		return fmt.Errorf("cannot write %s: %w", path, err)
	}
	return nil
}
