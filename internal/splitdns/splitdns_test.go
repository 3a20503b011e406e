package splitdns

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"maps"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/dns"
	"banger/internal/fault"
	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

var server = netip.MustParseAddrPort("127.0.0.1:42069")

// machine is a host of files; what is run is written down.
type machine struct {
	Host
	ran  []string
	fail error
}

func newMachine(t *testing.T, files map[string]string) *machine {
	t.Helper()
	m := &machine{}
	m.Root = t.TempDir()
	for name, text := range files {
		path := filepath.Join(m.Root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if strings.HasSuffix(name, "/") {
			continue
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	m.Run = func(_ context.Context, argv ...string) ([]byte, error) {
		if argv[0] == "resolvectl" {
			return []byte(files["version"]), nil
		}
		m.ran = append(m.ran, strings.Join(argv, " "))
		return nil, m.fail
	}
	return m
}

// tree is all files below the root with their contents, and all directories.
func (m *machine) tree(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	err := filepath.WalkDir(m.Root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			all[path] = "directory"
			return err
		}
		text, err := os.ReadFile(path)
		all[path] = string(text)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

var hosts = map[string]struct {
	files       map[string]string
	method      string
	file, wants string
	runs        string
}{
	"stub resolver": {
		map[string]string{"etc/resolv.conf": "nameserver 127.0.0.53\n", "etc/systemd/resolved.conf": "[Resolve]\n#DNS=\n", "version": "systemd 252 (252.39-1)"},
		"systemd-resolved", resolvedFile, "[Resolve]\nDNS=127.0.0.1:42069\nDomains=~vm\n", "systemctl try-restart systemd-resolved.service",
	},
	"resolved by nss": {
		map[string]string{
			"etc/resolv.conf": "nameserver 192.0.2.1\n", "run/systemd/resolve/resolv.conf": "", "etc/systemd/resolved.conf": "",
			"etc/nsswitch.conf": "passwd: files\nhosts:  files resolve [!UNAVAIL=return] dns # x\n", "version": "systemd 255.4",
		},
		"systemd-resolved", resolvedFile, "[Resolve]\nDNS=127.0.0.1:42069\nDomains=~vm\n", "systemctl try-restart systemd-resolved.service",
	},
	"newer resolved": {
		map[string]string{
			"etc/resolv.conf": "nameserver 127.0.0.53\n", "version": "systemd 258~rc1",
			"etc/systemd/resolved.conf": "[Resolve]\nDNS=9.9.9.9\n", // no harm there
		},
		"systemd-resolved", delegateFile, "[Delegate]\nDNS=127.0.0.1:42069\nDomains=vm\n", "systemctl try-restart systemd-resolved.service",
	},
	"networkmanager": {
		map[string]string{
			"etc/resolv.conf": "nameserver 127.0.0.1\n", "etc/NetworkManager/NetworkManager.conf": "[main]\ndns=default\n",
			"etc/NetworkManager/conf.d/dns.conf": "[main]\ndns = dnsmasq\n", "etc/dnsmasq.d/": "",
		},
		"networkmanager", managerFile, "server=/vm/127.0.0.1#42069\nrebind-domain-ok=/vm/\n", "nmcli general reload dns-full",
	},
	"dnsmasq": {
		map[string]string{"etc/resolv.conf": "# local\nnameserver 127.0.0.1\n", "etc/dnsmasq.d/other.conf": "cache-size=9\n"},
		"dnsmasq", dnsmasqFile, "server=/vm/127.0.0.1#42069\nrebind-domain-ok=/vm/\n", "systemctl try-restart dnsmasq.service",
	},
}

func TestInstallAndBack(t *testing.T) {
	for name, h := range hosts {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, h.files)
			before := m.tree(t)
			if s := m.Status(t.Context(), server); s.Method != h.method || s.Installed || s.Problem != "" {
				t.Errorf("before: %+v", s)
			}
			for i := range 2 {
				done, err := m.Install(t.Context(), server)
				if err != nil || done.Method != h.method || done.Changed != (i == 0) {
					t.Fatalf("install %d: %+v, %v", i, done, err)
				}
			}
			text, err := os.ReadFile(filepath.Join(m.Root, h.file))
			if err != nil || string(text) != mark+h.wants {
				t.Errorf("it says %q, %v", text, err)
			}
			if len(m.ran) != 1 || m.ran[0] != h.runs {
				t.Errorf("ran %q", m.ran)
			}
			if s := m.Status(t.Context(), server); !s.Installed || s.Problem != "" {
				t.Errorf("during: %+v", s)
			}
			if s := m.Status(t.Context(), netip.MustParseAddrPort("127.0.0.1:5")); s.Installed || s.Problem == "" {
				t.Errorf("with another address: %+v", s)
			}
			for i := range 2 {
				done, err := m.Uninstall(t.Context())
				if err != nil || done.Changed != (i == 0) {
					t.Fatalf("uninstall %d: %+v, %v", i, done, err)
				}
			}
			if after := m.tree(t); !maps.Equal(after, before) {
				t.Errorf("after: %v\nbefore: %v", after, before)
			}
			if len(m.ran) != 2 || m.ran[1] != h.runs {
				t.Errorf("ran %q", m.ran)
			}
		})
	}
}

func TestRefusals(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		kind  fault.Kind
		text  string
	}{
		"no resolver":     {map[string]string{"etc/resolv.conf": "nameserver 192.0.2.53\n"}, fault.Precondition, "192.0.2.53"},
		"no resolv.conf":  {nil, fault.Precondition, "names no server"},
		"dnsmasq unasked": {map[string]string{"etc/resolv.conf": "nameserver 192.0.2.53\n", "etc/dnsmasq.d/": ""}, fault.Precondition, "192.0.2.53"},
		"global servers": {
			map[string]string{"etc/resolv.conf": "nameserver 127.0.0.53\n", "etc/systemd/resolved.conf.d/x.conf": "[Resolve]\nDNS=9.9.9.9\n", "version": "systemd 252"},
			fault.Conflict, "9.9.9.9",
		},
		"somebody else's file": {
			map[string]string{"etc/resolv.conf": "nameserver 127.0.0.1\n", dnsmasqFile: "server=/vm/192.0.2.1\n"}, fault.Conflict, "not written by banger",
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMachine(t, c.files)
			before := m.tree(t)
			_, err := m.Install(t.Context(), server)
			if fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.text) || fault.HintOf(err) == "" {
				t.Errorf("got %v, hint %q", err, fault.HintOf(err))
			}
			if done, err := m.Uninstall(t.Context()); err != nil || done.Changed {
				t.Errorf("uninstall: %+v, %v", done, err)
			}
			if after := m.tree(t); !maps.Equal(after, before) {
				t.Errorf("after: %v\nbefore: %v", after, before)
			}
		})
	}
}

func TestWithoutRights(t *testing.T) {
	err := rights(&fs.PathError{Op: "open", Err: fs.ErrPermission}, "cannot write /etc/x", "banger dns install --server 127.0.0.1:42069")
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(fault.HintOf(err), "sudo banger dns install --server 127.0.0.1:42069") {
		t.Errorf("got %v, hint %q", err, fault.HintOf(err))
	}
}

// TestResolverThatDoesNotReload is as it was before: it may not run with our file.
func TestResolverThatDoesNotReload(t *testing.T) {
	for _, before := range []string{"", "127.0.0.1:5300"} {
		m := newMachine(t, hosts["dnsmasq"].files)
		if before != "" {
			if _, err := m.Install(t.Context(), netip.MustParseAddrPort(before)); err != nil {
				t.Fatal(err)
			}
		}
		tree := m.tree(t)
		m.ran, m.fail = nil, errors.New("the unit failed")
		result, err := m.Install(t.Context(), server)
		if fault.KindOf(err) != fault.Precondition || fault.HintOf(err) != "run: sudo systemctl try-restart dnsmasq.service" || result.Changed {
			t.Errorf("got %v, %v, hint %q", result, err, fault.HintOf(err))
		}
		if now := m.tree(t); !maps.Equal(now, tree) {
			t.Errorf("files: %v, before: %v", now, tree)
		}
		if len(m.ran) != 2 {
			t.Errorf("the resolver was told %q", m.ran)
		}
	}
}

// TestWithoutServiceManager: the file stays for whoever starts the resolver there.
func TestWithoutServiceManager(t *testing.T) {
	m := newMachine(t, hosts["dnsmasq"].files)
	m.fail = fault.New(fault.Precondition, "cannot start systemctl")
	result, err := m.Install(t.Context(), server)
	if fault.KindOf(err) != fault.Precondition || !result.Changed {
		t.Errorf("got %v, %v", result, err)
	}
	if s := m.Status(t.Context(), server); !s.Installed {
		t.Errorf("status %+v", s)
	}
}

// TestRealDnsmasq: a dnsmasq with our file asks banger for .vm and its own servers for the rest, and without it as before.
func TestRealDnsmasq(t *testing.T) {
	need.Root(t)
	need.Binary(t, "dnsmasq")
	ns := hosttest.NetNS(t)
	m := newMachine(t, hosts["dnsmasq"].files)
	names := dns.New(slog.New(slog.DiscardHandler))
	names.Set(dns.Zone{Hosts: []dns.Host{{Name: "web", Addresses: []netip.Addr{netip.MustParseAddr("172.30.0.2")}}}})
	l, err := names.Listen(server)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	daemon := &dnsmasq{t: t, dir: filepath.Join(m.Root, "etc/dnsmasq.d")}
	defer daemon.stop()
	m.Run = func(context.Context, ...string) ([]byte, error) { daemon.restart(); return nil, nil }
	daemon.restart()
	if got := lookup(t, ns, "web.vm."); got != "" {
		t.Errorf("before: %s", got)
	}
	if _, err := m.Install(t.Context(), server); err != nil {
		t.Fatal(err)
	}
	if got := lookup(t, ns, "web.vm."); got != "172.30.0.2" {
		t.Errorf("installed: %q", got)
	}
	if got := lookup(t, ns, "there.example."); got != "203.0.113.9" {
		t.Errorf("other names: %q", got)
	}
	if _, err := m.Uninstall(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := lookup(t, ns, "web.vm."); got != "" {
		t.Errorf("after: %s", got)
	}
}

// dnsmasq is the real one, which stops what looks like an attack by private addresses.
type dnsmasq struct {
	t   *testing.T
	dir string
	cmd *exec.Cmd
}

func (d *dnsmasq) restart() {
	d.t.Helper()
	d.stop()
	d.cmd = exec.Command("dnsmasq", "--keep-in-foreground", "--conf-file=/dev/null", "--conf-dir="+d.dir, "--no-resolv", "--no-hosts",
		"--user=root", "--stop-dns-rebind", "--address=/example/203.0.113.9", "--listen-address=127.0.0.1", "--bind-interfaces", "--pid-file=")
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	for deadline := time.Now().Add(20 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("tcp", "127.0.0.1:53")
		if err == nil {
			conn.Close()
			return
		}
	}
	d.t.Fatal("dnsmasq does not listen")
}

func (d *dnsmasq) stop() {
	if d.cmd != nil {
		_ = d.cmd.Process.Kill()
		_ = d.cmd.Wait()
		d.cmd = nil
	}
}

// lookup asks what resolv.conf names in the namespace; "" when there is no such name.
func lookup(t *testing.T, ns *hosttest.NS, name string) string {
	t.Helper()
	r := net.Resolver{PreferGo: true, Dial: func(ctx context.Context, network, _ string) (conn net.Conn, err error) {
		err = ns.Do(func() error {
			conn, err = (&net.Dialer{}).DialContext(ctx, network, "127.0.0.1:53")
			return err
		})
		return conn, err
	}}
	addresses, err := r.LookupNetIP(t.Context(), "ip4", name)
	if err != nil || len(addresses) == 0 {
		return ""
	}
	return addresses[0].String()
}
