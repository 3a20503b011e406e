package client

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	bangerv1 "banger/api/banger/v1"
	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/build"
	"banger/internal/fault"
	"banger/internal/paths"
)

// place makes directories with a short path.
func place(t *testing.T) paths.Paths {
	t.Helper()
	dir, err := os.MkdirTemp("", "bgr")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	p := paths.Under(dir)
	if err := p.Make(); err != nil {
		t.Fatal(err)
	}
	return p
}

func serve(t *testing.T, p paths.Paths, h http.HandlerFunc) {
	t.Helper()
	l, err := net.Listen("unix", p.Socket())
	if err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: h, Protocols: new(http.Protocols)}
	srv.Protocols.SetUnencryptedHTTP2(true)
	go func() { _ = srv.Serve(l) }()
	t.Cleanup(func() { _ = srv.Close() })
}

func hello(id string, api int) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set(HeaderBuild, id)
		w.Header().Set(HeaderAPI, strconv.Itoa(api))
	}
}

func dial(t *testing.T, p paths.Paths, auto bool) error {
	t.Helper()
	c, err := Dial(t.Context(), Options{Paths: p, AutoStart: auto, Command: []string{"/nonexistent"}})
	if err == nil {
		c.Close()
	}
	return err
}

func want(t *testing.T, err error, kind fault.Kind, text string) {
	t.Helper()
	var f *fault.Error
	if !errors.As(err, &f) || f.Kind != kind || !strings.Contains(err.Error(), text) || f.Hint == "" {
		t.Errorf("got %v (%s, hint %q), want %s with %q and a hint", err, fault.KindOf(err), fault.HintOf(err), kind, text)
	}
}

func TestNewerDaemon(t *testing.T) {
	for _, auto := range []bool{false, true} { // it is not replaced by the older
		p := place(t)
		serve(t, p, hello("9.9", build.API+1))
		want(t, dial(t, p, auto), fault.Usage, "older than the running daemon (9.9)")
	}
}

func TestDaemonOfThisBuildIsTaken(t *testing.T) {
	p := place(t)
	serve(t, p, hello(build.ID(), build.API))
	if err := dial(t, p, true); err != nil {
		t.Error(err)
	}
}

func TestWhateverRunsIsTakenWithoutAutoStart(t *testing.T) {
	p := place(t)
	serve(t, p, hello("0.1", build.API))
	if err := dial(t, p, false); err != nil {
		t.Error(err)
	}
}

func TestStrangersOnTheSocket(t *testing.T) {
	p := place(t)
	serve(t, p, func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusTeapot) })
	want(t, dial(t, p, false), fault.Precondition, "not bangerd")
}

func TestStaleSocketFile(t *testing.T) {
	p := place(t)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: p.Socket()})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	want(t, dial(t, p, false), fault.Precondition, "not running")
}

func TestNothingToStart(t *testing.T) {
	err := dial(t, place(t), true)
	if fault.KindOf(err) != fault.Precondition || !strings.Contains(err.Error(), "/nonexistent") {
		t.Errorf("got %v", err)
	}
}

func TestSocketPathTooLong(t *testing.T) {
	p := paths.Under(filepath.Join(t.TempDir(), strings.Repeat("long", 30)))
	want(t, dial(t, p, true), fault.Precondition, "socket path is")
}

func TestSilentDaemon(t *testing.T) {
	p := place(t)
	l, err := net.Listen("unix", p.Socket()) // the kernel accepts, nobody answers
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	_, err = Dial(ctx, Options{Paths: p})
	want(t, err, fault.Timeout, "does not answer")
}

// TestDaemonThatEndsInTheMiddle loses the connection before an answer, after its headers, and inside a message.
func TestDaemonThatEndsInTheMiddle(t *testing.T) {
	verbs := map[string]func(*Client) error{
		"it was creating VM web": func(c *Client) error {
			_, err := c.Create(t.Context(), &bangerv1.CreateVMRequest{Spec: &bangerv1.VMSpec{Name: "web"}}, nil)
			return err
		},
		"it was stopping VM web": func(c *Client) error {
			_, err := c.Stop(t.Context(), &bangerv1.StopVMRequest{Vm: "web"}, nil)
			return err
		},
		"it was setting up": func(c *Client) error {
			_, err := c.Setup(t.Context(), &bangerv1.SetupRequest{}, nil)
			return err
		},
		"the connection to the daemon broke": func(c *Client) error {
			_, err := c.VMs.ListVMs(t.Context(), &bangerv1.ListVMsRequest{})
			return err
		},
	}
	for where, part := range map[string][]byte{"before": nil, "headers": {}, "inside": {0, 0, 0, 0, 9, 'x'}} {
		for while, verb := range verbs {
			t.Run(where+"/"+while, func(t *testing.T) {
				p := place(t)
				l, err := net.Listen("unix", p.Socket())
				if err != nil {
					t.Fatal(err)
				}
				srv := &http.Server{Protocols: new(http.Protocols)}
				srv.Protocols.SetUnencryptedHTTP2(true)
				srv.Handler = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
					hello(build.ID(), build.API)(w, r)
					if r.URL.Path == HelloPath {
						return
					}
					if part != nil {
						w.Header().Set("Content-Type", r.Header.Get("Content-Type"))
						_, _ = w.Write(part)
						_ = http.NewResponseController(w).Flush()
					}
					_ = srv.Close()
				})
				go func() { _ = srv.Serve(l) }()
				c, err := Dial(t.Context(), Options{Paths: p})
				if err != nil {
					t.Fatal(err)
				}
				defer c.Close()
				err = verb(c)
				want(t, err, fault.Precondition, while)
				if strings.HasPrefix(while, "it was") && !strings.HasPrefix(err.Error(), "the daemon ended while ") {
					t.Errorf("got %v", err)
				}
			})
		}
	}
}

// TestLostOneOfTwoDaemons: where somebody listens again, nobody is said to have ended.
func TestLostOneOfTwoDaemons(t *testing.T) {
	p := place(t)
	serve(t, p, hello(build.ID(), build.API))
	err := lost(bangerv1connect.VMServiceDeleteVMProcedure, "web", p.Socket())
	want(t, err, fault.Precondition, "the connection to the daemon broke while it was deleting VM web")
}
