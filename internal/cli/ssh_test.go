package cli

import (
	"crypto/ed25519"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/hosttest/need"
)

// sshGuest is an SSH server that runs commands with sh and admits one key.
type sshGuest struct {
	config *ssh.ServerConfig
	host   ssh.Signer
}

func newKey(t *testing.T) (ed25519.PrivateKey, ssh.Signer) {
	t.Helper()
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	signer, err := ssh.NewSignerFromKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return key, signer
}

func (g *sshGuest) serve(t *testing.T) (port int) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go g.talk(conn)
		}
	}()
	return l.Addr().(*net.TCPAddr).Port
}

func (g *sshGuest) talk(conn net.Conn) {
	defer conn.Close()
	_, channels, requests, err := ssh.NewServerConn(conn, g.config)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests)
	for offered := range channels {
		channel, requests, err := offered.Accept()
		if err != nil {
			return
		}
		go runRequests(channel, requests)
	}
}

func runRequests(channel ssh.Channel, requests <-chan *ssh.Request) {
	for r := range requests {
		if r.Type != "exec" {
			_ = r.Reply(r.Type == "shell", nil)
			continue
		}
		_ = r.Reply(true, nil)
		var line struct{ Text string }
		_ = ssh.Unmarshal(r.Payload, &line)
		cmd := exec.Command("/bin/sh", "-c", line.Text)
		cmd.Stdin, cmd.Stdout, cmd.Stderr = channel, channel, channel.Stderr()
		var exit *exec.ExitError
		code := 0
		if err := cmd.Run(); errors.As(err, &exit) {
			code = exit.ExitCode()
		}
		_, _ = channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{uint32(code)}))
		_ = channel.Close()
	}
}

// TestRealSSHClient: the ssh of this host takes our arguments, trusts only the host key we know, and
// carries words and exit codes.
func TestRealSSHClient(t *testing.T) {
	need.Binary(t, "ssh")
	dir := filepath.Join(t.TempDir(), "with space")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	key, user := newKey(t)
	_, host := newKey(t)
	block, err := ssh.MarshalPrivateKey(key, "")
	if err != nil {
		t.Fatal(err)
	}
	identity, known := filepath.Join(dir, "id"), filepath.Join(dir, "known_hosts")
	write(t, identity, string(pem.EncodeToMemory(block)))
	write(t, known, "web.vm "+string(ssh.MarshalAuthorizedKey(host.PublicKey())))

	g := &sshGuest{config: &ssh.ServerConfig{PublicKeyCallback: func(_ ssh.ConnMetadata, k ssh.PublicKey) (*ssh.Permissions, error) {
		if string(k.Marshal()) != string(user.PublicKey().Marshal()) {
			return nil, errors.New("another key")
		}
		return nil, nil
	}}, host: host}
	g.config.AddHostKey(host)
	s := newSession(t, "web=running")
	s.world.endpoint = &bangerv1.SSHEndpoint{
		User: "root", Host: "127.0.0.1", Port: int32(g.serve(t)), IdentityFile: identity, KnownHostsFile: known, HostKeyAlias: "web.vm",
	}

	s.stdin = "input"
	stdout, stderr, code := s.runWords("vm", "ssh", "web", "--", "sh", "-c", `echo "$0 $1"; cat; exit 3`, "a  b", "it's")
	if code != 3 || stdout != "a  b it's\ninput" || !strings.Contains(stderr, "VM web is still running") {
		t.Errorf("code %d, stdout %q, stderr %q", code, stdout, stderr)
	}
	stdout, _, code = s.runWords("vm", "ssh", "web", "--", "echo one | tr o 0; exit 4")
	if code != 4 || stdout != "0ne\n" {
		t.Errorf("code %d, stdout %q", code, stdout)
	}

	_, stranger := newKey(t)
	write(t, known, "web.vm "+string(ssh.MarshalAuthorizedKey(stranger.PublicKey())))
	if _, _, code := s.runWords("vm", "ssh", "web", "--", "true"); code != 255 {
		t.Errorf("a stranger's host key: code %d", code)
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
