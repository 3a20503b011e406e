package sshd

import (
	"bytes"
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/crypto/ssh"

	"banger/internal/agent/run"
	"banger/internal/hosttest"
)

func TestMain(m *testing.M) { hosttest.Main(m) }

// guest is a server with files of its own.
type guest struct {
	root    string
	address string
	client  ssh.Signer
	host    ssh.PublicKey
}

func newKey(t *testing.T) (ssh.Signer, []byte) {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, "")
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return signer, pem.EncodeToMemory(block)
}

func start(t *testing.T) *guest {
	t.Helper()
	g := &guest{root: t.TempDir()}
	for _, dir := range []string{"etc/ssh", "home/.ssh"} {
		if err := os.MkdirAll(filepath.Join(g.root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	g.client, _ = newKey(t)
	host, file := newKey(t)
	g.host = host.PublicKey()
	restricted, _ := newKey(t)
	g.write(t, hostKey, string(file))
	g.write(t, "home/.ssh/authorized_keys", "# comment\n\nfrom=\"10.0.0.1\" "+string(ssh.MarshalAuthorizedKey(restricted.PublicKey()))+
		string(ssh.MarshalAuthorizedKey(g.client.PublicKey())))
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	g.address = l.Addr().String()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- Serve(ctx, l, Options{
			Root: g.root, Runner: run.Runner{Root: g.root}, SFTP: []string{"cat"},
			Account: func(user string) (Account, error) {
				if user != "root" {
					return Account{}, errors.New("no such user")
				}
				return Account{Home: "/home", Shell: "/bin/sh"}, nil
			},
		})
	}()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return g
}

func (g *guest) write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(g.root, name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (g *guest) dial(user string, key ssh.Signer) (*ssh.Client, error) {
	return ssh.Dial("tcp", g.address, &ssh.ClientConfig{
		User: user, Auth: []ssh.AuthMethod{ssh.PublicKeys(key)}, HostKeyCallback: ssh.FixedHostKey(g.host), Timeout: 10 * time.Second,
	})
}

func (g *guest) session(t *testing.T) (*ssh.Client, *ssh.Session) {
	t.Helper()
	c, err := g.dial("root", g.client)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	s, err := c.NewSession()
	if err != nil {
		t.Fatal(err)
	}
	return c, s
}

func TestProgram(t *testing.T) {
	g := start(t)
	_, s := g.session(t)
	var stdout, stderr bytes.Buffer
	s.Stdin, s.Stdout, s.Stderr = strings.NewReader("to stdin"), &stdout, &stderr
	if err := s.Setenv("LC_TEST", "value"); err != nil {
		t.Error(err)
	}
	if err := s.Setenv("LD_PRELOAD", "value"); err == nil {
		t.Error("a variable that changes programs was taken")
	}
	err := s.Run(`cat; echo " $LC_TEST"; echo err >&2; exit 7`)
	var exit *ssh.ExitError
	if !errors.As(err, &exit) || exit.ExitStatus() != 7 || stdout.String() != "to stdin value\n" || stderr.String() != "err\n" {
		t.Errorf("error %v, stdout %q, stderr %q", err, stdout.String(), stderr.String())
	}
}

func TestSignals(t *testing.T) {
	g := start(t)
	_, s := g.session(t)
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("echo ready; exec sleep 60"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, 6)); err != nil {
		t.Fatal(err)
	}
	if err := s.Signal(ssh.SIGTERM); err != nil {
		t.Fatal(err)
	}
	var exit *ssh.ExitError
	if err := s.Wait(); !errors.As(err, &exit) || exit.Signal() != "TERM" {
		t.Errorf("a program that was ended: %v", err)
	}
}

// TestTerminal: a shell with a terminal knows its size, also when it changes, and what TERM is.
func TestTerminal(t *testing.T) {
	g := start(t)
	_, s := g.session(t)
	in, err := s.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	var out bytes.Buffer
	s.Stdout = &out
	if err := s.RequestPty("xterm-test", 24, 80, ssh.TerminalModes{}); err != nil {
		t.Fatal(err)
	}
	if err := s.WindowChange(50, 132); err != nil {
		t.Fatal(err)
	}
	if err := s.Shell(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "for i in $(seq 100); do stty size | grep -q '50 132' && break; sleep 0.2; done; echo is $TERM $(stty size); exit 3\n"); err != nil {
		t.Fatal(err)
	}
	var exit *ssh.ExitError
	if err := s.Wait(); !errors.As(err, &exit) || exit.ExitStatus() != 3 || !strings.Contains(out.String(), "is xterm-test 50 132") {
		t.Errorf("error %v, output %q", err, out.String())
	}
}

func TestStrangersStayOutside(t *testing.T) {
	g := start(t)
	other, _ := newKey(t)
	for name, dial := range map[string]func() (*ssh.Client, error){
		"another key":  func() (*ssh.Client, error) { return g.dial("root", other) },
		"another user": func() (*ssh.Client, error) { return g.dial("nobody", g.client) },
		"a password": func() (*ssh.Client, error) {
			return ssh.Dial("tcp", g.address, &ssh.ClientConfig{User: "root", Auth: []ssh.AuthMethod{ssh.Password("")}, HostKeyCallback: ssh.FixedHostKey(g.host)})
		},
	} {
		if c, err := dial(); err == nil {
			_ = c.Close()
			t.Errorf("%s was let in", name)
		}
	}
	// Who is let in, and the host key, are read for each connection: a copy of the guest has others.
	host, file := newKey(t)
	g.host = host.PublicKey()
	g.write(t, hostKey, string(file))
	g.write(t, "home/.ssh/authorized_keys", string(ssh.MarshalAuthorizedKey(other.PublicKey())))
	c, err := g.dial("root", other)
	if err != nil {
		t.Fatalf("the new key: %v", err)
	}
	_ = c.Close()
	if c, err := g.dial("root", g.client); err == nil {
		_ = c.Close()
		t.Error("the old key was let in")
	}
}

func TestSubsystem(t *testing.T) {
	g := start(t)
	_, s := g.session(t)
	if err := s.RequestSubsystem("netconf"); err == nil {
		t.Error("an unknown subsystem was started")
	}
	_, s = g.session(t) // the subsystem is cat here
	in, err := s.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.RequestSubsystem("sftp"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(in, "packets"); err != nil {
		t.Fatal(err)
	}
	got := make([]byte, 7)
	if _, err := io.ReadFull(out, got); err != nil || string(got) != "packets" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestForwarding: ports go both ways.
func TestForwarding(t *testing.T) {
	g := start(t)
	c, _ := g.session(t)
	l, err := c.Listen("tcp", "127.0.0.1:0") // in the guest
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = io.Copy(conn, conn)
		_ = conn.Close()
	}()
	conn, err := c.Dial("tcp", l.Addr().String()) // from the guest
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "around"); err != nil {
		t.Fatal(err)
	}
	if err := conn.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(conn); err != nil || string(got) != "around" {
		t.Errorf("%q, %v", got, err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := c.Dial("tcp", "127.0.0.1:1"); err == nil {
		t.Error("a port where nobody listens was connected")
	}
}

// TestForwardedEndsWithClient: what came to a client's port here ends with the client, also where the other end says
// nothing and stays.
func TestForwardedEndsWithClient(t *testing.T) {
	g := start(t)
	before := goleak.IgnoreCurrent()
	c, _ := g.session(t)
	l, err := c.Listen("tcp", "127.0.0.1:0") // in the guest
	if err != nil {
		t.Fatal(err)
	}
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	there, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(conn, "x"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(there, make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	hosttest.NoGoroutines(t, before)
}

// TestClientGoes: a program whose client is gone is ended.
func TestClientGoes(t *testing.T) {
	g := start(t)
	c, s := g.session(t)
	out, err := s.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Start("echo $$; while :; do sleep 0.05; done"); err != nil {
		t.Fatal(err)
	}
	var pid int
	if _, err := fmt.Fscanln(out, &pid); err != nil {
		t.Fatal(err)
	}
	_ = c.Close()
	for end := time.Now().Add(10 * time.Second); !errors.Is(syscall.Kill(pid, 0), syscall.ESRCH); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("the program lives on")
		}
	}
}
