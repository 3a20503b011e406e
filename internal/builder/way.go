package builder

import (
	"context"
	"errors"
	"io"
	"net"
	"net/url"
	"os"
	"strings"

	"al.essio.dev/pkg/shellescape"

	"banger/internal/fault"
)

// Way is how this machine reaches the internet. Steps that need it do so in the same way: through its proxies, and
// trusting the certificate authorities that it trusts. Nothing of it stays in the image.
type Way struct {
	HTTPProxy, HTTPSProxy, NoProxy string // as in the environment variables of these names
	Authorities                    string // a file of certificates; empty: the image's own
}

// maxForwarded is how many connections of a guest to a proxy there may be at a time; npm opens some 15.
const maxForwarded = 64

// hostAuthorities are where distributions keep the certificates of all authorities in one file.
var hostAuthorities = []string{"/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"}

// HostWay reads it from the daemon's environment and machine.
func HostWay() Way {
	either := func(name string) string {
		if v := os.Getenv(name); v != "" {
			return v
		}
		return os.Getenv(strings.ToUpper(name))
	}
	w := Way{HTTPProxy: either("http_proxy"), HTTPSProxy: either("https_proxy"), NoProxy: either("no_proxy")}
	for _, path := range hostAuthorities {
		if info, err := os.Stat(path); err == nil && info.Mode().IsRegular() {
			w.Authorities = path
			break
		}
	}
	return w
}

// open makes the way usable in the guest, and returns the assignments of variables that programs find it by. A proxy is
// reached through the SSH connection, as it may listen on this machine's loopback alone.
func (w Way) open(ctx context.Context, g *guest) (env string, err error) {
	var list []string
	for _, p := range []struct{ name, url string }{{"http_proxy", w.HTTPProxy}, {"https_proxy", w.HTTPSProxy}} {
		if p.url == "" {
			continue
		}
		inside, err := g.bringProxy(p.url)
		if err != nil {
			return "", err
		}
		list = append(list, p.name+"="+shellescape.Quote(inside), strings.ToUpper(p.name)+"="+shellescape.Quote(inside))
	}
	if len(list) > 0 {
		none := strings.TrimPrefix(w.NoProxy+",localhost,127.0.0.1,::1", ",")
		list = append(list, "no_proxy="+shellescape.Quote(none), "NO_PROXY="+shellescape.Quote(none))
	}
	if w.Authorities != "" {
		f, err := os.Open(w.Authorities)
		if err != nil {
			return "", fault.Wrap(fault.Precondition, err, "cannot read the certificate authorities")
		}
		defer func() { _ = f.Close() }()
		const inside = workDir + "/authorities.pem"
		if err := g.put(ctx, inside, "0644", rootOwner, f); err != nil {
			return "", err
		}
		// The directory is private: programs that drop their rights have to get there as well.
		if err := g.run(ctx, "chmod 711 "+workDir, nil); err != nil {
			return "", err
		}
		for _, name := range []string{
			"SSL_CERT_FILE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "NODE_EXTRA_CA_CERTS", "npm_config_cafile", "PIP_CERT", "REQUESTS_CA_BUNDLE",
		} {
			list = append(list, name+"="+inside)
		}
	}
	return strings.Join(append(list, ""), " "), nil
}

// bringProxy lets a port of the guest's loopback lead to a proxy of this machine, and returns the proxy's URL there.
func (g *guest) bringProxy(proxy string) (string, error) {
	if !strings.Contains(proxy, "://") {
		proxy = "http://" + proxy
	}
	u, err := url.Parse(proxy)
	if err != nil || u.Hostname() == "" {
		return "", fault.New(fault.Precondition, "the proxy in the daemon's environment is no URL").
			WithHint("set http_proxy and https_proxy like http://HOST:PORT, then: banger daemon restart")
	}
	port := u.Port()
	if port == "" {
		port = map[string]string{"https": "443", "socks5": "1080"}[u.Scheme]
		if port == "" {
			port = "80"
		}
	}
	if u.Scheme == "https" { // its certificate is for its own name, by which the guest reaches it as well
		return proxy, nil
	}
	l, err := g.client.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", fault.Wrap(fault.Precondition, err, "the VM's SSH server does not pass the proxy on").
			WithHint("AllowTcpForwarding has to be on in the image's sshd_config")
	}
	ctx, cancel := context.WithCancel(context.Background())
	go func() {
		_ = g.client.Wait() // for what reason it ended, whoever uses it is told
		cancel()
	}()
	go forward(ctx, l, net.JoinHostPort(u.Hostname(), port))
	u.Host = l.Addr().String()
	return u.String(), nil
}

// forward ends with l. What it connected ends with ctx.
func forward(ctx context.Context, l net.Listener, to string) {
	places := make(chan struct{}, maxForwarded)
	for {
		inside, err := l.Accept()
		if err != nil {
			return
		}
		select {
		case places <- struct{}{}:
		case <-ctx.Done():
			_ = inside.Close()
			return
		}
		go func() {
			defer func() { <-places }()
			carry(ctx, inside, to)
		}()
	}
}

// carry connects inside with to, until both sides or ctx end.
func carry(ctx context.Context, inside net.Conn, to string) {
	defer func() { _ = inside.Close() }()
	dial, cancel := context.WithTimeout(ctx, sshAttempt)
	defer cancel()
	outside, err := (&net.Dialer{}).DialContext(dial, "tcp", to)
	if err != nil {
		return // the program in the guest sees a connection that was closed
	}
	defer func() { _ = outside.Close() }()
	defer context.AfterFunc(ctx, func() { _ = outside.Close() })()
	done := make(chan error, 2)
	for _, pair := range [][2]net.Conn{{inside, outside}, {outside, inside}} {
		go func() {
			_, err := io.Copy(pair[0], pair[1])
			if c, ok := pair[0].(interface{ CloseWrite() error }); ok {
				err = errors.Join(err, c.CloseWrite())
			}
			done <- err
		}()
	}
	<-done
	<-done
}
