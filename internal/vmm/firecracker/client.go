package firecracker

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"banger/internal/fault"
	"banger/internal/system"
)

// APISocket is Firecracker's API, in the machine's directory.
const APISocket = "api.sock"

// Bounds of the API.
const (
	callTimeout   = 5 * time.Second  // of a call that only sets something; upstream's own tests want 700 ms
	startTimeout  = 10 * time.Second // of InstanceStart, which maps the guest's memory
	loadTimeout   = 30 * time.Second
	createTimeout = 30 * time.Second // of writing a snapshot, and one second more for each createPace bytes
	createPace    = 100 << 20

	maxAnswer = 256 << 10 // bytes; the largest, of GET /vm/config, has a few thousand
	maxSaid   = 400       // bytes of an answer that are shown
)

// client calls Firecracker's HTTP API over its Unix socket. Calls go out one at a time on one connection, as
// Firecracker serves them.
type client struct {
	transport *http.Transport
	http      *http.Client
	turn      chan struct{} // holds one token: the right to call
}

// newClient returns the client of the Firecracker that listens in dir. Nothing is connected before the first call.
func newClient(dir string) *client {
	t := &http.Transport{
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return system.DialUnixIn(ctx, dir, APISocket)
		},
		MaxConnsPerHost: 1, MaxIdleConnsPerHost: 1, DisableCompression: true, MaxResponseHeaderBytes: 16 << 10,
	}
	c := &client{transport: t, http: &http.Client{Transport: t}, turn: make(chan struct{}, 1)}
	c.turn <- struct{}{}
	return c
}

// close lets go of the connection.
func (c *client) close() { c.transport.CloseIdleConnections() }

// apiError is a request that Firecracker refused.
type apiError struct {
	Call   string // method and path
	Status int
	Said   string // fault_message, or the raw body where that is no JSON
}

// Error returns what Firecracker said.
func (e *apiError) Error() string {
	return fmt.Sprintf("%s: status %d: %s", e.Call, e.Status, e.Said)
}

// call sends a request with a JSON body, unless body is nil, and decodes the answer into result, unless that is nil.
// An error is a fault: what Firecracker refused is classed by its text, a silence is a Timeout, and a process that
// hung up a Conflict.
func (c *client) call(ctx context.Context, limit time.Duration, method, path string, body, result any) error {
	name := method + " " + path
	caller := ctx
	select {
	case <-c.turn: // whose calls have limits of their own
		defer func() { c.turn <- struct{}{} }()
	case <-ctx.Done():
		return unanswered(caller, name, limit, ctx.Err())
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	err := c.exchange(ctx, method, path, body, result)
	var refused *apiError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &refused):
		return advise(refused)
	case ctx.Err() != nil || errors.Is(err, os.ErrDeadlineExceeded):
		return unanswered(caller, name, limit, ctx.Err())
	case hungUp(err):
		return fault.Wrap(fault.Conflict, err, "Firecracker hung up: %s", name)
	}
	return fault.Wrap(fault.KindOf(err), err, "Firecracker's API: %s", name)
}

// unanswered tells a caller who gave up from a Firecracker that is silent.
func unanswered(caller context.Context, name string, limit time.Duration, err error) error {
	if caller.Err() != nil {
		return fault.Wrap(fault.KindOf(caller.Err()), caller.Err(), "Firecracker's API: %s", name)
	}
	return fault.Wrap(fault.Timeout, err, "Firecracker did not answer within %s: %s", limit, name).
		WithHint("stop the VM: a Firecracker that does not answer is killed")
}

// hungUp tells an end of the connection, or of the process behind it, from other errors.
func hungUp(err error) bool {
	for _, end := range []error{
		io.EOF, io.ErrUnexpectedEOF, syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNREFUSED, syscall.ENOENT, net.ErrClosed,
	} {
		if errors.Is(err, end) {
			return true
		}
	}
	return false
}

func (c *client) exchange(ctx context.Context, method, path string, body, result any) error {
	var content io.Reader
	if body != nil {
		text, err := json.Marshal(body)
		if err != nil {
			return err
		}
		content = bytes.NewReader(text) // of known length: Firecracker does not read chunked bodies
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://firecracker"+path, content)
	if err != nil {
		return err
	}
	if body != nil {
		req.Header.Set("Content-Type", "application/json")
	}
	res, err := c.http.Do(req)
	if err != nil {
		return err
	}
	defer res.Body.Close()
	text, err := io.ReadAll(io.LimitReader(res.Body, maxAnswer+1))
	if err != nil {
		return err
	}
	switch {
	case len(text) > maxAnswer:
		return fmt.Errorf("its answer has more than %d bytes", maxAnswer)
	case res.StatusCode < 200 || res.StatusCode > 299:
		return &apiError{Call: method + " " + path, Status: res.StatusCode, Said: said(text)}
	case result == nil:
		return nil
	}
	if err := json.Unmarshal(text, result); err != nil {
		return fmt.Errorf("its answer is not understood: %w: %s", err, oneLine(text))
	}
	return nil
}

// said returns what an answer says is wrong. Errors of the HTTP layer have a raw newline within a string, which is
// no JSON: then it is the text itself.
func said(text []byte) string {
	var answer struct {
		Fault string `json:"fault_message"`
		Error string `json:"error"`
	}
	if json.Unmarshal(text, &answer) == nil {
		if said := answer.Fault + answer.Error; said != "" {
			return oneLine([]byte(said))
		}
	}
	return oneLine(text)
}

// oneLine is one line of text for people, not too long.
func oneLine(text []byte) string {
	line := strings.Join(strings.Fields(fault.Printable(string(text))), " ")
	if len(line) > maxSaid {
		line = strings.ToValidUTF8(line[:maxSaid], "") + "…"
	}
	return line
}
