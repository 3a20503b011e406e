package fakefc_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/internal/guest"
	"banger/internal/vmm/firecracker/fakefc"
	"banger/internal/vmm/firecracker/fctest"
)

const vsock = `PUT /vsock {"guest_cid":3,"uds_path":"v.sock"}`

// source starts a guest with a vsock and an argument.
func source(t *testing.T, args string) *process {
	t.Helper()
	p := serve(t, files(t), fctest.Fake(t))
	p.must(toSerial, fmt.Sprintf(`PUT /boot-source {"kernel_image_path":"kernel","boot_args":"console=ttyS0 panic=1 %s"}`, args), vsock, start)
	return p
}

// connect sends a line and returns the connection and the answer, which is empty when the connection ended.
func (p *process) connect(patience time.Duration, parts ...string) (net.Conn, string, error) {
	p.t.Helper()
	c, err := p.dialTo("v.sock")
	if err != nil {
		p.t.Fatal(err)
	}
	p.t.Cleanup(func() { _ = c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		p.t.Fatal(err)
	}
	for i, part := range parts {
		if i > 0 {
			time.Sleep(10 * time.Millisecond) // so that it is read by itself
		}
		if _, err := io.WriteString(c, part); err != nil {
			return c, "", nil // it hung up before
		}
	}
	line, err := bufio.NewReaderSize(c, 16).ReadString('\n')
	if line == "" && !errors.Is(err, os.ErrDeadlineExceeded) {
		err = nil // an end is as good as a reset
	}
	return c, line, err
}

var hello = fmt.Sprintf("CONNECT %d\n", fakefc.AgentPort)

const (
	long  = 5 * time.Second
	short = 150 * time.Millisecond
)

func TestConnect(t *testing.T) {
	p := source(t, "")
	p.says("serial.log", "login:")
	for host, line := range []string{hello, "connect 1024\n", "CoNnEcT 1024\n", "CONNECT 000000000001024\n"} {
		_, got, err := p.connect(long, line)
		if want := fmt.Sprintf("OK %d\n", 1<<30+host); got != want || err != nil {
			t.Errorf("%q: %q, %v, want %q", line, got, err, want)
		}
	}
	for _, line := range []string{
		"CONNECT 1\n", "CONNECT 9999\n", "CONNECT 4294967296\n", "CONNECT -1\n", "CONNECT x\n", "HELLO 1024\n", "GET / HTTP/1.1\r\n\r\n",
		"CONNECT 1024", "CONNECT 00000000000000000000000000001024\n", strings.Repeat("x", 100),
	} {
		if _, got, err := p.connect(long, line); got != "" || err != nil {
			t.Errorf("%q: %q, %v", line, got, err)
		}
	}
	for _, cut := range [][]string{{"CONN", "ECT 1024\n"}, {"CONNECT 1024", "\n"}} {
		if _, got, err := p.connect(long, cut...); got != "" || err != nil {
			t.Errorf("in pieces: %q, %v", got, err)
		}
	}
}

// TestSilence: before the guest's driver is up, and while it is paused, connections are taken and hear nothing.
func TestSilence(t *testing.T) {
	each(t, func(t *testing.T, f target) {
		p := serve(t, files(t), f.path)
		boot := f.guest(p, fctest.Count) // which has no driver
		if !f.real {
			boot = strings.Replace(boot, "panic=1", fakefc.ArgHangBoot, 1)
		}
		p.must(boot, vsock)
		for _, step := range []string{"GET /", start, pause} {
			p.must(step)
			if _, got, err := p.connect(short, hello); got != "" || !errors.Is(err, os.ErrDeadlineExceeded) {
				t.Errorf("after %s: %q, %v", step, got, err)
			}
		}
	})
}

func (p *process) client() *guest.Client {
	return guest.NewClient(func(context.Context) (net.Conn, error) {
		c, line, err := p.connect(long, hello)
		if err != nil || !strings.HasPrefix(line, "OK ") {
			return nil, errors.Join(err, errors.New("answer "+line))
		}
		return c, c.SetDeadline(time.Time{})
	})
}

// TestAgent: what answers on the port is the guest's agent; pausing holds it up, and after a snapshot streams are reset.
func TestAgent(t *testing.T) {
	p := source(t, "")
	p.says("serial.log", "login:")
	c := p.client()
	defer c.Close()
	first, err := c.Ping(t.Context(), &agentv1.PingRequest{})
	if err != nil {
		t.Fatal(err)
	}
	idle, line, err := p.connect(long, hello)
	if err != nil || line == "" {
		t.Fatalf("%q, %v", line, err)
	}
	p.must(pause)
	ctx, cancel := context.WithTimeout(t.Context(), short)
	defer cancel()
	if _, err := c.Ping(ctx, &agentv1.PingRequest{}); err == nil {
		t.Error("a paused guest answers")
	}
	p.must(create, resume)
	if n, err := idle.Read(make([]byte, 1)); err == nil || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a stream outlives a snapshot: %d, %v", n, err)
	}
	again := p.client()
	defer again.Close()
	second, err := again.Ping(t.Context(), &agentv1.PingRequest{})
	if err != nil || second.GetBootId() != first.GetBootId() {
		t.Errorf("%v, then %v, %v", first, second, err)
	}
}

// TestSlowBoot: nothing is heard at first, then the guest refuses, then its agent answers.
func TestSlowBoot(t *testing.T) {
	p := source(t, fakefc.ArgSlowBoot+"600ms")
	if _, got, err := p.connect(50*time.Millisecond, hello); !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("at first: %q, %v", got, err)
	}
	refused := false
	for end := time.Now().Add(limit); time.Now().Before(end); {
		_, got, err := p.connect(50*time.Millisecond, hello)
		switch {
		case strings.HasPrefix(got, "OK "):
			if !refused {
				t.Error("it never refused")
			}
			return
		case err == nil:
			refused = true
		}
	}
	t.Error("it never answers")
}

// TestPowerOff: a guest that powers off halts, and the process lives on; a reboot ends it.
func TestPowerOff(t *testing.T) {
	for mode, word := range map[agentv1.ShutdownRequest_Mode]string{
		agentv1.ShutdownRequest_MODE_POWEROFF: "reboot: Power down", agentv1.ShutdownRequest_MODE_REBOOT: "reboot: Restarting system",
	} {
		p := source(t, "")
		p.says("serial.log", "login:")
		c := p.client()
		defer c.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		if _, err := c.Shutdown(ctx, &agentv1.ShutdownRequest{Mode: mode}); err != nil {
			t.Logf("the answer was lost: %v", err) // the guest was faster
		}
		p.says("serial.log", word)
		if mode == agentv1.ShutdownRequest_MODE_REBOOT {
			if code := p.ended(); code != 0 {
				t.Errorf("code %d", code)
			}
			continue
		}
		p.must(pause, resume)
		p.steps(step{"GET /", 200, words("Running")})
		if _, got, err := p.connect(short, hello); got != "" || !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("a guest that was switched off answers %q, %v", got, err)
		}
	}
}

// TestNoBoot: arguments with which a distribution's kernel finds no disks, and a console that is not there.
func TestNoBoot(t *testing.T) {
	p := source(t, "nomodule")
	if code := p.ended(); code != 0 || !strings.Contains(p.read("serial.log"), "Unable to mount root fs") {
		t.Errorf("nomodule: code %d, %q", code, p.read("serial.log"))
	}
	p = serve(t, files(t), fctest.Fake(t))
	p.must(toSerial, `PUT /boot-source {"kernel_image_path":"kernel"}`, start)
	if code := p.ended(); code != 0 || p.read("serial.log") != "" {
		t.Errorf("the default arguments: code %d, %q", code, p.read("serial.log"))
	}
}
