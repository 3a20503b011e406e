package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/hosttest/need"
)

// namesServer is where the daemon serves the host.
const namesServer = "127.0.0.1:42069"

// TestNamesAndPorts: the host and guests find VMs by name, ssh works by name with and without a network, and
// ports of the host lead into a guest; all of it as before after the daemon's death, and gone with the VM.
func TestNamesAndPorts(t *testing.T) {
	need.Binary(t, "ssh")
	need.Binary(t, "dnsmasq")
	w := newWorld(t)
	command(t, "ip", "link", "set", "lo", "up")
	upstream(t)
	w.daemonAsking(t, "nameserver 127.0.0.53\n")
	port := freePort(t)
	w.banger("vm", "create", "web", "-p", fmt.Sprintf("%d:80", port))
	w.banger("vm", "create", "db", "--no-nat")
	web, db := w.show("web"), w.show("db")

	t.Run("the host", func(t *testing.T) {
		for name, want := range map[string]string{"web.vm.": web.IP, "DB.vm.": db.IP, "nobody.vm.": ""} {
			if got := resolve(t, name); got != want {
				t.Errorf("%s is %q, want %q", name, got, want)
			}
		}
		if names, err := resolver().LookupAddr(t.Context(), web.IP); err != nil || len(names) != 1 || names[0] != "web.vm." {
			t.Errorf("%s is %q, %v", web.IP, names, err)
		}
	})
	t.Run("guests", func(t *testing.T) { guestsFindNames(t, w, web, db) })
	t.Run("ssh by name", func(t *testing.T) { sshByName(t, w) })
	t.Run("ports", func(t *testing.T) { portsLeadIn(t, w, port) })

	w.killDaemon()
	w.banger("vm", "list") // starts it again
	if got := resolve(t, "web.vm."); got != web.IP {
		t.Errorf("after the daemon's death web.vm is %q", got)
	}
	if out := w.guest("web", "getent ahostsv4 db.vm"); !strings.HasPrefix(out, db.IP+" ") {
		t.Errorf("after the daemon's death a guest finds %q", out)
	}
	if got := said(t, port, "hello"); !strings.Contains(got, "got hello") {
		t.Errorf("after the daemon's death the port says %q", got)
	}
	w.banger("vm", "stop", "db", "web")
	for _, name := range []string{"web.vm.", "db.vm."} {
		if got := resolve(t, name); got != "" {
			t.Errorf("%s is stopped and still %s", name, got)
		}
	}
	if conn, err := net.Dial("tcp", fmt.Sprintf("127.0.0.1:%d", port)); err == nil {
		conn.Close()
		t.Error("the port of a stopped VM is open")
	}
}

func guestsFindNames(t *testing.T, w *world, web, db shown) {
	if out := w.guest("web", "getent ahostsv4 db.vm && getent ahostsv4 there.example"); !strings.HasPrefix(out, db.IP+" ") || !strings.Contains(out, "\n203.0.113.9 ") {
		t.Errorf("web finds %q", out)
	}
	w.banger("vm", "ssh", "db", "--", "true") // its SSH server listens
	w.guest("web", `perl -MIO::Socket::INET -e 'IO::Socket::INET->new(PeerAddr => "db.vm:22", Timeout => 20) or die "db.vm: $@"'`)
	if out := w.guest("db", "getent ahostsv4 web.vm"); !strings.HasPrefix(out, web.IP+" ") {
		t.Errorf("db finds %q", out)
	}
	if r := w.try("vm", "exec", "db", "--", "getent", "ahostsv4", "there.example"); r.code == 0 {
		t.Errorf("a VM without a way out carries names out: %+v", r)
	}
	if out := w.guest("web", "getent hosts "+db.IP); !strings.HasSuffix(out, "db.vm") {
		t.Errorf("%s is %q in web", db.IP, out)
	}
}

func sshByName(t *testing.T, w *world) {
	w.env = append(w.env, "HOME="+w.dir)
	config := filepath.Join(w.dir, ".ssh", "config")
	if err := os.MkdirAll(filepath.Dir(config), 0o700); err != nil {
		t.Fatal(err)
	}
	const before = "# mine\nHost *\n\tUser nobody"
	if err := os.WriteFile(config, []byte(before), 0o600); err != nil {
		t.Fatal(err)
	}
	w.banger("ssh-config", "install")
	var notices strings.Builder // of the last one
	ssh := func(program string, args ...string) string {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
		defer cancel()
		cmd := exec.CommandContext(ctx, program, append([]string{"-F", config, "-o", "BatchMode=yes"}, args...)...)
		cmd.Env = w.env
		notices.Reset()
		cmd.Stderr = &notices
		out, err := cmd.Output()
		if err != nil {
			t.Errorf("%s %v: %v\n%s%s", program, args, err, out, notices.String())
		}
		return strings.TrimSpace(string(out))
	}
	if out := ssh("ssh", "web.vm", "hostname"); out != "web" {
		t.Errorf("ssh web.vm says %q", out)
	}
	blob := filepath.Join(w.dir, "blob")
	if err := os.WriteFile(blob, []byte(strings.Repeat("banger", 100_000)), 0o600); err != nil {
		t.Fatal(err)
	}
	ssh("scp", "-q", blob, "web.vm:/root/blob")
	if out := w.guest("web", "wc -c </root/blob"); out != "600000" {
		t.Errorf("scp wrote %s bytes", out)
	}
	w.guest("web", "ip link set eth0 down")
	if out := ssh("ssh", "web.vm", "hostname"); out != "web" || !strings.Contains(notices.String(), "guest channel") {
		t.Errorf("without a network ssh web.vm says %q, and %q", out, notices.String())
	}
	w.guest("web", "ip link set eth0 up && ip route add default via 172.30.0.1")
	w.banger("ssh-config", "uninstall")
	if text, err := os.ReadFile(config); err != nil || string(text) != before {
		t.Errorf("~/.ssh/config is %q, %v", text, err)
	}
}

// portsLeadIn reaches a service on the guest's own localhost.
func portsLeadIn(t *testing.T, w *world, port int) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	const service = `use IO::Socket::INET; my $s = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 80, Listen => 5) or die $!;
while (my $c = $s->accept) { while (<$c>) { print $c "got $_" } close $c }`
	if r := w.run(ctx, service, "vm", "exec", "-i", "web", "--", "sh", "-c", "cat >/root/s.pl; setsid perl /root/s.pl </dev/null >/dev/null 2>&1 &"); r.code != 0 {
		t.Fatalf("%+v", r)
	}
	w.guest("web", "for i in $(seq 100); do ss -ltn | grep -q 127.0.0.1:80 && exit; sleep 0.1; done; exit 1")
	if got := said(t, port, "hello"); got != "got hello\n" {
		t.Errorf("the port says %q", got)
	}
	if r := w.try("vm", "create", "late", "-p", fmt.Sprintf("%d:80", port)); r.code != 4 || !strings.Contains(r.stderr, fmt.Sprint(port)) {
		t.Errorf("a taken port: %+v", r)
	}
	if r := w.try("vm", "show", "late"); r.code != 3 {
		t.Errorf("its VM is there: %+v", r)
	}
	more := freePort(t)
	w.banger("vm", "ports", "add", "web", fmt.Sprintf("%d:22", more))
	if got := said(t, more, "x"); !strings.HasPrefix(got, "SSH-2.0-") {
		t.Errorf("an added port says %q", got)
	}
	w.banger("vm", "ports", "remove", "web", fmt.Sprint(more))
	if out := w.banger("vm", "ports", "list", "web"); strings.Contains(out, fmt.Sprint(more)) || !strings.Contains(out, fmt.Sprint(port)) {
		t.Errorf("the list is\n%s", out)
	}
}

// said sends a line to a port of this host and returns all that is answered.
func said(t *testing.T, port int, line string) string {
	t.Helper()
	conn, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		t.Error(err)
		return ""
	}
	defer conn.Close()
	conn.SetDeadline(time.Now().Add(30 * time.Second))
	if _, err := fmt.Fprintln(conn, line); err != nil {
		t.Error(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Error(err)
	}
	text, err := bufio.NewReader(conn).ReadString('\n')
	if err != nil {
		t.Error(err)
	}
	return text
}

func freePort(t *testing.T) int {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port
}

func resolver() *net.Resolver {
	return &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, network, namesServer)
	}}
}

// resolve asks the daemon; "" when there is no such name.
func resolve(t *testing.T, name string) string {
	t.Helper()
	found, err := resolver().LookupNetIP(t.Context(), "ip4", name)
	var missing *net.DNSError
	if errors.As(err, &missing) && missing.IsNotFound {
		return ""
	}
	if err != nil {
		t.Errorf("%s: %v", name, err)
		return ""
	}
	return found[0].String()
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// upstream is a name server of the world on this host.
func upstream(t *testing.T) {
	t.Helper()
	cmd := exec.Command("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--no-resolv", "--no-hosts", "--user=root",
		"--address=/example/203.0.113.9", "--listen-address=127.0.0.53", "--bind-interfaces", "--pid-file=")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	})
}

// daemonAsking starts the daemon anew, on a host with this resolv.conf.
func (w *world) daemonAsking(t *testing.T, resolvConf string) {
	t.Helper()
	file := filepath.Join(w.dir, "resolv.conf")
	if err := os.WriteFile(file, []byte(resolvConf), 0o644); err != nil {
		t.Fatal(err)
	}
	w.banger("daemon", "stop")
	cmd := exec.Command("unshare", "--mount", "sh", "-c", `mount --bind "$0" /etc/resolv.conf && exec ../../bin/banger daemon start`, file)
	cmd.Env = w.env
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("start the daemon: %v\n%s", err, out)
	}
}
