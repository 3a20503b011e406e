package fakefc_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"banger/internal/vmm/firecracker/fakefc"
	"banger/internal/vmm/firecracker/fctest"
)

func TestMain(m *testing.M) { os.Exit(fctest.Main(m)) }

const (
	socket = "api.sock"
	limit  = 10 * time.Second // of everything that is waited for
)

// process is a Firecracker in a directory of its own.
type process struct {
	t    *testing.T
	dir  string
	cmd  *exec.Cmd
	out  bytes.Buffer
	done chan error
}

// launch starts a Firecracker.
func launch(t *testing.T, dir, path string, args ...string) *process {
	t.Helper()
	p := &process{t: t, dir: dir, cmd: exec.Command(path, args...), done: make(chan error, 1)}
	p.cmd.Dir, p.cmd.Stdout, p.cmd.Stderr = dir, &p.out, &p.out
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() {
		p.done <- p.cmd.Wait()
		close(exited)
	}()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // it may have ended
		<-exited
		if t.Failed() {
			said := p.out.String()
			t.Logf("%s said, at the end:\n%s", filepath.Base(path), said[max(0, len(said)-1000):])
		}
	})
	return p
}

// serve starts one and waits until its API listens.
func serve(t *testing.T, dir, path string, args ...string) *process {
	t.Helper()
	p := launch(t, dir, path, append([]string{"--api-sock", socket}, args...)...)
	for end := time.Now().Add(limit); ; {
		c, err := p.dial()
		if err == nil {
			_ = c.Close()
			return p
		}
		if time.Now().After(end) {
			t.Fatalf("it does not listen: %v", err)
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// dial connects to the API.
func (p *process) dial() (net.Conn, error) { return p.dialTo(socket) }

func (p *process) dialTo(name string) (net.Conn, error) {
	d, err := os.Open(p.dir)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	// The directory's own name may be longer than an address.
	c, err := net.DialTimeout("unix", fmt.Sprintf("/proc/self/fd/%d/%s", d.Fd(), name), limit)
	if err == nil {
		err = c.SetDeadline(time.Now().Add(limit))
	}
	return c, err
}

// raw sends bytes as they are and returns what comes: as much as is wanted, and what follows it within a moment.
func (p *process) raw(wanted int, parts ...string) string {
	p.t.Helper()
	c, err := p.dial()
	if err != nil {
		p.t.Fatal(err)
	}
	defer c.Close()
	var got bytes.Buffer
	for i, part := range parts {
		if part != "" {
			if _, err := io.WriteString(c, part); err != nil {
				p.t.Fatal(err)
			}
		}
		switch {
		case i == len(parts)-1:
			read(c, &got, wanted, time.Second)
		case strings.HasSuffix(part, "\r\n\r\n"): // which is answered
			read(c, &got, got.Len()+1, time.Second)
		}
		read(c, &got, 1<<20, 20*time.Millisecond)
	}
	return got.String()
}

// read reads until so much has come, or nothing for a while.
func read(c net.Conn, to *bytes.Buffer, wanted int, patience time.Duration) {
	b := make([]byte, 64<<10)
	for to.Len() < wanted {
		_ = c.SetReadDeadline(time.Now().Add(patience)) // a failure shows at once in Read
		n, err := c.Read(b)
		to.Write(b[:n])
		if err != nil {
			return
		}
	}
}

// answer is what came of a request.
type answer struct {
	status     int
	body       string
	deprecated bool
}

// ask sends "METHOD /path body" and reads the answer.
func (p *process) ask(request string) answer {
	p.t.Helper()
	a, err := p.try(request)
	if err != nil {
		p.t.Fatalf("%.200s: %v", request, err)
	}
	return a
}

func (p *process) try(request string) (answer, error) {
	c, err := p.dial()
	if err != nil {
		return answer{}, err
	}
	defer c.Close()
	method, rest, _ := strings.Cut(request, " ")
	path, body, _ := strings.Cut(rest, " ")
	text := fmt.Sprintf("%s %s HTTP/1.1\r\nHost: x\r\n", method, path)
	if body != "" {
		text += fmt.Sprintf("Content-Length: %d\r\n", len(body))
	}
	if _, err := io.WriteString(c, text+"\r\n"+body); err != nil {
		return answer{}, err
	}
	res, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		return answer{}, err
	}
	defer res.Body.Close()
	got := answer{status: res.StatusCode, deprecated: res.Header.Get("Deprecation") == "true"}
	if res.StatusCode != http.StatusNoContent {
		b, err := io.ReadAll(res.Body)
		if err != nil {
			return answer{}, err
		}
		got.body = string(b)
	}
	return got, nil
}

// must asks for what must succeed.
func (p *process) must(requests ...string) {
	p.t.Helper()
	for _, r := range requests {
		if a := p.ask(r); a.status >= 300 {
			p.t.Fatalf("%.200s: %d %s", r, a.status, a.body)
		}
	}
}

// ended waits for the end and returns the exit code, or minus the number of the signal.
func (p *process) ended() int {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	select {
	case err := <-p.done:
		var exit *exec.ExitError
		switch {
		case err == nil:
			return 0
		case !errors.As(err, &exit):
			p.t.Fatal(err)
		case exit.Sys().(syscall.WaitStatus).Signaled():
			return -int(exit.Sys().(syscall.WaitStatus).Signal())
		}
		return exit.ExitCode()
	case <-ctx.Done():
		p.t.Fatal("it does not end")
		return 0
	}
}

// write makes a file in the process's directory.
func (p *process) write(name string, content []byte) {
	p.t.Helper()
	if err := os.WriteFile(filepath.Join(p.dir, name), content, 0o600); err != nil {
		p.t.Fatal(err)
	}
}

func (p *process) read(name string) string {
	p.t.Helper()
	b, err := os.ReadFile(filepath.Join(p.dir, name))
	if err != nil {
		p.t.Fatal(err)
	}
	return string(b)
}

// target is a Firecracker under test.
type target struct {
	path string
	real bool
}

// each runs a test on the fake, and on the real Firecracker where there is one.
func each(t *testing.T, test func(t *testing.T, f target)) {
	t.Run("fake", func(t *testing.T) { test(t, target{path: fctest.Fake(t)}) })
	t.Run("real", func(t *testing.T) { test(t, onReal(t)) })
}

// onReal is the real one. What these tests ask for came with 1.16 at the latest; the driver's own go on with older ones.
func onReal(t *testing.T) target {
	t.Helper()
	path := fctest.Real(t)
	if v := fctest.Version(t, path); !strings.HasPrefix(v, "1.16.") && !strings.HasPrefix(v, "1.17.") {
		t.Skipf("these tests are of 1.16 and 1.17, and this is %s", v)
	}
	return target{path: path, real: true}
}

// guest puts a guest that ends like this into p's directory, and returns the request that names it. What a kernel of its
// own is to the real one, an argument is to the fake.
func (f target) guest(p *process, e fctest.Ending) string {
	p.t.Helper()
	args := map[fctest.Ending]string{fctest.Panic: fakefc.ArgPanic, fctest.TripleFault: fakefc.ArgTripleFault}[e]
	p.write("kernel", fctest.Guest(e))
	return fmt.Sprintf(`PUT /boot-source {"kernel_image_path":"kernel","boot_args":"console=ttyS0 panic=1 %s"}`, args)
}

const (
	start  = `PUT /actions {"action_type":"InstanceStart"}`
	pause  = `PATCH /vm {"state":"Paused"}`
	resume = `PATCH /vm {"state":"Resumed"}`
	create = `PUT /snapshot/create {"snapshot_path":"state","mem_file_path":"memory"}`
	load   = `PUT /snapshot/load {"snapshot_path":"state","mem_backend":{"backend_type":"File","backend_path":"memory"},"resume_vm":true}`
)
