package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"banger/internal/hosttest/need"
)

const (
	mirrorSocketVariable = "BANGER_E2E_MIRROR"
	mirrorLimit          = 30 * time.Second
)

// serveMirror is a proxy on a unix socket outside of the tests' network namespace. It reaches the Debian mirror alone.
func serveMirror(socket string) (end func(), err error) {
	mirror, err := url.Parse(need.Mirror())
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return nil, err
	}
	onward := &httputil.ReverseProxy{Rewrite: func(*httputil.ProxyRequest) {}}
	server := &http.Server{ReadHeaderTimeout: mirrorLimit, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Host != mirror.Host {
			http.Error(w, "only the mirror is reached from here", http.StatusForbidden)
			return
		}
		onward.ServeHTTP(w, r)
	})}
	go func() { _ = server.Serve(l) }() // until it is closed
	return func() { _ = server.Close() }, nil
}

// mirrorProxy returns the URL of a proxy on the loopback of the tests' namespace that reaches the Debian mirror.
func mirrorProxy(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	go func() {
		for {
			inside, err := l.Accept()
			if err != nil {
				return
			}
			go carry(inside, os.Getenv(mirrorSocketVariable))
		}
	}()
	proxy := "http://" + l.Addr().String()
	u, err := url.Parse(proxy)
	if err != nil {
		t.Fatal(err)
	}
	client := http.Client{Timeout: mirrorLimit, Transport: &http.Transport{Proxy: http.ProxyURL(u)}}
	answer, err := client.Head(need.Mirror() + "/dists/stable/InRelease")
	if err == nil {
		err = answer.Body.Close()
	}
	if err == nil && answer.StatusCode != http.StatusOK {
		err = fmt.Errorf("the mirror answers %s", answer.Status)
	}
	if err != nil {
		need.Missing(t, "network", err.Error())
	}
	return proxy
}

// carry ends when both sides have.
func carry(inside net.Conn, socket string) {
	defer inside.Close()
	outside, err := (&net.Dialer{Timeout: mirrorLimit}).DialContext(context.Background(), "unix", socket)
	if err != nil {
		return
	}
	defer outside.Close()
	back := make(chan struct{})
	go func() {
		defer close(back)
		_, _ = io.Copy(inside, outside)
		_ = inside.(*net.TCPConn).CloseWrite()
	}()
	_, _ = io.Copy(outside, inside)
	_ = outside.(*net.UnixConn).CloseWrite()
	<-back
}

// TestBuildFromDebian takes the recipe "small", and one on it, through every stage, mmdebstrap's as well, behind a proxy on
// the host's loopback, of which nothing stays in the image.
func TestBuildFromDebian(t *testing.T) {
	w := newColdWorld(t)
	w.ownImages()
	proxy := mirrorProxy(t)
	w.env = append(w.env, "http_proxy="+proxy)
	if os.Getenv(need.MirrorVariable) != "" {
		path := filepath.Join(w.dir, "config/banger/config.toml")
		if err := os.WriteFile(path, []byte("templates = false\nmirror = \""+need.Mirror()+"\"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	_, port, err := net.SplitHostPort(strings.TrimPrefix(proxy, "http://"))
	if err != nil {
		t.Fatal(err)
	}
	dir := w.recipe("mine", `
from = "recipe:small"
[[step]]
name = "inside"
run = "test -z \"${http_proxy:-}\" && test -e /root/hello.json"
[[step]]
name = "fetch"
needs = "internet"
run = "curl -fsS -o /srv/fetched `+need.Mirror()+`/dists/stable/InRelease"
[[test]]
name = "fetched"
run = "grep -q Suite /srv/fetched"
[[test]]
name = "no trace of the proxy"
run = "! grep -rIl -e '127.0.0.1:`+port+`' -e http_proxy= /etc /root /var/lib 2>/dev/null | grep ."
`, nil)
	if name := w.banger("image", "build", dir); !strings.HasPrefix(name, "mine-") {
		t.Errorf("built %q", name)
	}
	if left := w.leftOfBuilds(); len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	r := w.try("image", "test", "mine")
	for _, want := range []string{"passed greeting", "passed fetched", "passed no trace of the proxy"} {
		if r.code != 0 || !strings.Contains(r.stdout, want) {
			t.Errorf("image test does not say %q: %+v", want, r)
		}
	}
	logs, _ := filepath.Glob(filepath.Join(w.dir, "state/banger/builds/mine-*.log"))
	if len(logs) != 1 {
		t.Fatalf("logs: %v", logs)
	}
	if text, err := os.ReadFile(logs[0]); err != nil || !strings.Contains(string(text), "installing remaining packages") {
		t.Errorf("the log does not have what mmdebstrap says: %v\n%s", err, text)
	}
}
