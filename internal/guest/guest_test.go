package guest

import (
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cavaliergopher/cpio"
	"golang.org/x/crypto/ssh"
	"google.golang.org/protobuf/encoding/protojson"
	"pgregory.net/rapid"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/fault"
	"banger/internal/hosttest"
)

// A base of any length, also one that is no multiple of four, stays as it is and the archive after
// it holds the config, private.
func TestInitramfsHoldsBaseAndConfig(t *testing.T) {
	dir := t.TempDir()
	rapid.Check(t, func(t *rapid.T) {
		base := rapid.SliceOfN(rapid.Byte(), 0, 9).Draw(t, "base")
		cfg := &agentv1.GuestConfig{Hostname: rapid.StringMatching(`[a-z]{1,8}`).Draw(t, "host"), SshHostKey: "-----BEGIN\n-----END\n"}
		in, out := filepath.Join(dir, "base"), filepath.Join(dir, "out")
		if err := os.WriteFile(in, base, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := WriteInitramfs(out, in, cfg); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(out)
		if err != nil || !bytes.HasPrefix(data, base) {
			t.Fatalf("base is not at the beginning: %v", err)
		}
		aligned := (len(base) + 3) / 4 * 4
		got, mode := readConfig(t, data[aligned:])
		if mode.Perm() != 0o600 || got.Hostname != cfg.Hostname || got.SshHostKey != cfg.SshHostKey {
			t.Fatalf("config %v, mode %o", got, mode)
		}
	})
	if info, err := os.Stat(filepath.Join(dir, "out")); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	if names, _ := filepath.Glob(filepath.Join(dir, ".*")); len(names) > 0 {
		t.Fatalf("left behind: %v", names)
	}
}

func readConfig(t *rapid.T, archive []byte) (*agentv1.GuestConfig, cpio.FileMode) {
	r := cpio.NewReader(bytes.NewReader(archive))
	for {
		h, err := r.Next()
		if err != nil {
			t.Fatalf("no config in the archive: %v", err)
		}
		if h.Name != ConfigPath {
			continue
		}
		text, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		var cfg agentv1.GuestConfig
		if err := protojson.Unmarshal(text, &cfg); err != nil {
			t.Fatal(err)
		}
		return &cfg, h.Mode
	}
}

func TestInitramfsWithoutBaseLeavesNothing(t *testing.T) {
	dir := t.TempDir()
	err := WriteInitramfs(filepath.Join(dir, "out"), filepath.Join(dir, "none"), &agentv1.GuestConfig{})
	if fault.KindOf(err) != fault.Precondition {
		t.Fatalf("got %v", err)
	}
	if entries, _ := os.ReadDir(dir); len(entries) > 0 {
		t.Fatalf("left behind: %v", entries)
	}
}

func TestKeyFileIsMadeOnceAndKept(t *testing.T) {
	path := filepath.Join(t.TempDir(), "id_ed25519")
	first, err := EnsureKeyFile(path, "banger")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(path + ".pub"); err != nil { // it comes back
		t.Fatal(err)
	}
	second, err := EnsureKeyFile(path, "banger")
	if err != nil || second != first {
		t.Fatalf("second: %v, equal %v", err, second == first)
	}
	public, err := os.ReadFile(path + ".pub")
	if err != nil || string(public) != first.Public+"\n" {
		t.Fatalf("public half %q, %v", public, err)
	}
	for _, p := range []string{path, path + ".pub"} {
		if info, err := os.Stat(p); err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("%v, %v", info, err)
		}
	}
	signer, err := ssh.ParsePrivateKey([]byte(first.Private))
	if err != nil || !strings.Contains(first.Public, strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey())))) {
		t.Fatalf("halves do not belong together: %v", err)
	}
}

func TestKeyFileOfSomethingElseIsNotOverwritten(t *testing.T) {
	path := filepath.Join(t.TempDir(), "id_ed25519")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := EnsureKeyFile(path, ""); fault.KindOf(err) != fault.Precondition || fault.HintOf(err) == "" {
		t.Fatalf("got %v", err)
	}
	if data, _ := os.ReadFile(path); string(data) != "precious" {
		t.Fatalf("overwritten with %q", data)
	}
}

func TestAuthorizedKey(t *testing.T) {
	k, err := NewKeyPair("me@host")
	if err != nil {
		t.Fatal(err)
	}
	if err := CheckAuthorizedKey(k.Public); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"", "ssh-ed25519", "ssh-ed25519 AAAA", "hello world", k.Public + "\n" + k.Public, k.Private} {
		if err := CheckAuthorizedKey(bad); fault.KindOf(err) != fault.Usage {
			t.Errorf("%.30q: %v", bad, err)
		}
	}
}

func TestKnownHosts(t *testing.T) {
	got := string(KnownHosts([]KnownHost{
		{Alias: "web.vm", Addr: netip.MustParseAddr("172.30.0.3"), Public: "ssh-ed25519 BBBB web"},
		{Alias: "db.vm", Public: "ssh-ed25519 AAAA"},
		{Alias: "new.vm"},
	}))
	want := "# Written by bangerd at every change.\ndb.vm ssh-ed25519 AAAA\nweb.vm,172.30.0.3 ssh-ed25519 BBBB\n"
	if got != want {
		t.Errorf("got %q", got)
	}
}

func TestMasksAreUniqueUnitNames(t *testing.T) {
	seen := map[string]bool{}
	for _, unit := range DefaultMasks() {
		unit = strings.Replace(unit, ".target.wants/", ".", 1)
		if seen[unit] || !strings.Contains(unit, ".") && !strings.HasSuffix(unit, "-generator") || strings.ContainsAny(unit, "/ ") {
			t.Errorf("bad or repeated unit %q", unit)
		}
		seen[unit] = true
	}
	if seen["ssh.service"] || seen["dbus.service"] {
		t.Error("a unit that people need is masked")
	}
}

type pinger struct {
	agentv1connect.UnimplementedAgentServiceHandler
	calls atomic.Int32
}

func (p *pinger) Ping(context.Context, *agentv1.PingRequest) (*agentv1.PingResponse, error) {
	p.calls.Add(1)
	return &agentv1.PingResponse{BootId: "x"}, nil
}

// The client dials once for many calls, dials again after its stream broke, and leaves nothing.
func TestClientDialsAgain(t *testing.T) {
	defer hosttest.NoGoroutines(t)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	var h2 http.Protocols
	h2.SetUnencryptedHTTP2(true)
	p := &pinger{}
	_, handler := agentv1connect.NewAgentServiceHandler(p)
	server := &http.Server{Handler: handler, Protocols: &h2}
	go func() { _ = server.Serve(l) }()
	defer server.Close()

	var conns []net.Conn
	c := NewClient(func(ctx context.Context) (net.Conn, error) {
		conn, err := (&net.Dialer{}).DialContext(ctx, "unix", l.Addr().String())
		conns = append(conns, conn)
		return conn, err
	})
	defer c.Close()
	for range 3 {
		if _, err := c.Ping(t.Context(), &agentv1.PingRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if len(conns) != 1 {
		t.Fatalf("%d streams for three calls", len(conns))
	}
	_ = conns[0].Close()
	var pingErr error
	for range 3 { // the call that finds the break may fail
		if _, pingErr = c.Ping(t.Context(), &agentv1.PingRequest{}); pingErr == nil {
			break
		}
	}
	if pingErr != nil || len(conns) != 2 {
		t.Fatalf("after the break: %v, %d streams", pingErr, len(conns))
	}
}

// peak is the largest heap that was seen, without what nobody holds.
type peak struct{ atomic.Uint64 }

func (p *peak) look() {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	for {
		most := p.Load()
		if m.HeapAlloc <= most || p.CompareAndSwap(most, m.HeapAlloc) {
			return
		}
	}
}

// A hostile guest cannot make the host hold more than one message, packed or not, or endless headers.
func TestClientBoundsWhatItTakes(t *testing.T) {
	var h2 http.Protocols
	h2.SetUnencryptedHTTP2(true)
	zeros := make([]byte, 4<<20)
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	for range 8 {
		_, _ = z.Write(zeros)
	}
	_ = z.Close()
	var heap peak
	answers := map[string]http.HandlerFunc{
		"long": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/proto")
			for range 8 {
				if _, err := w.Write(zeros); err != nil {
					return // the client has hung up
				}
				heap.look()
			}
		},
		"packed": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "application/proto")
			w.Header().Set("Content-Encoding", "gzip")
			_, _ = w.Write(packed.Bytes())
		},
		"headers": func(w http.ResponseWriter, _ *http.Request) {
			for i := range 100 {
				w.Header().Set(fmt.Sprintf("X-%d", i), strings.Repeat("x", 4096))
			}
			w.Header().Set("Content-Type", "application/proto")
			w.WriteHeader(http.StatusOK)
		},
	}
	for name, answer := range answers {
		t.Run(name, func(t *testing.T) {
			l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
			if err != nil {
				t.Fatal(err)
			}
			server := &http.Server{Handler: answer, Protocols: &h2}
			go func() { _ = server.Serve(l) }()
			defer server.Close()
			c := NewClient(func(ctx context.Context) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", l.Addr().String())
			})
			defer c.Close()
			heap.Store(0)
			heap.look()
			before := heap.Load()
			if _, err = c.Ping(t.Context(), &agentv1.PingRequest{}); err == nil {
				t.Fatal("the answer was taken")
			}
			if name == "packed" && !strings.Contains(err.Error(), "encoding") {
				t.Fatalf("it was unpacked: %v", err)
			}
			heap.look()
			if held := heap.Load() - before; held > 16<<20 {
				t.Fatalf("%d bytes were held: %v", held, err)
			}
		})
	}
}

func TestClientGivesUpWithItsContext(t *testing.T) {
	defer hosttest.NoGoroutines(t)
	c := NewClient(func(ctx context.Context) (net.Conn, error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	defer c.Close()
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.Ping(ctx, &agentv1.PingRequest{}); err == nil || errors.Is(err, io.EOF) {
		t.Fatalf("got %v", err)
	}
}
