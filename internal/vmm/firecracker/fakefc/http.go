package fakefc

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
)

// Limits of Firecracker's HTTP server.
const (
	maxConnections = 10
	maxLine        = 1024 // of the request line and of each header
	defaultPayload = 51200
)

// fullAnswer is all that the eleventh client gets. Its status line has no space at the end, unlike all others.
const fullAnswer = "HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n" +
	`{ "error": "Too many open connections" }`

// request is one that was parsed.
type request struct {
	method, path string
	body         []byte
	hasBody      bool
	expect       bool
}

// response is what is answered.
type response struct {
	status     int
	body       []byte
	deprecated bool
}

// bytes has no reason phrase, and without a body no length.
func (r response) bytes() []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "HTTP/1.1 %d \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n", r.status)
	if r.deprecated {
		b.WriteString("Deprecation: true\r\n")
	}
	if r.body != nil {
		fmt.Fprintf(&b, "Content-Type: application/json\r\nContent-Length: %d\r\n", len(r.body))
	}
	b.WriteString("\r\n")
	b.Write(r.body)
	return b.Bytes()
}

// broken is the answer to what is no request: its body has a raw newline within a string, which is no JSON.
func broken(text string) response {
	return response{status: 400, body: fmt.Appendf(nil, "{ \"error\": \"%s\nAll previous unanswered requests will be dropped.\" }", text)}
}

// server answers clients of the API socket.
type server struct {
	version version
	payload int // the most bytes of a body
	handle  func(net.Conn, request)
	slots   chan struct{}
}

func newServer(v version, payload int, handle func(net.Conn, request)) *server {
	return &server{version: v, payload: payload, handle: handle, slots: make(chan struct{}, maxConnections)}
}

func (s *server) serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		select {
		case s.slots <- struct{}{}:
			go func() {
				defer func() { <-s.slots }()
				s.connection(c)
			}()
		default:
			_, _ = io.WriteString(c, fullAnswer) // who hung up does not want to know
			_ = c.Close()
		}
	}
}

// connection answers one client, request after request. Bytes that are no request take with them everything that came
// at once with them, the good requests before them too; what comes next is taken for a new request.
func (s *server) connection(c net.Conn) {
	defer c.Close()
	var pending []byte
	chunk := make([]byte, maxLine)
	told := false // that it may send its body
	for {
		n, err := c.Read(chunk)
		if err != nil {
			return
		}
		pending = append(pending, chunk[:n]...)
		requests, rest, waiting, err := s.parseAll(pending)
		pending = rest
		if err != nil {
			if _, err := c.Write(broken(err.Error()).bytes()); err != nil {
				return
			}
		}
		for _, r := range requests {
			told = false
			s.handle(c, r)
		}
		if waiting && !told {
			told = true
			if _, err := c.Write(response{status: 100}.bytes()); err != nil {
				return
			}
		}
	}
}

// parseAll reads as many requests as there are. waiting: the last one is not whole, and its client wants to be told that
// it may go on.
func (s *server) parseAll(b []byte) (requests []request, rest []byte, waiting bool, err error) {
	for {
		r, after, err := s.parse(b)
		switch {
		case errors.Is(err, errMore):
			return requests, b, r.expect, nil
		case err != nil:
			return nil, nil, false, err
		}
		requests, b = append(requests, r), after
	}
}

// badRequest is what no request can be made of.
type badRequest string

func (b badRequest) Error() string { return string(b) }

// errMore says that the request is not whole.
var errMore = errors.New("more is to come")

const invalidRequest = badRequest("Invalid request.")

// parse reads one request from the bytes that have come.
func (s *server) parse(b []byte) (r request, rest []byte, err error) {
	line, rest, err := nextLine(b)
	if err != nil {
		if !errors.Is(err, errMore) {
			err = invalidRequest
		}
		return r, b, err
	}
	if r.method, r.path, err = s.requestLine(line); err != nil {
		return r, b, err
	}
	length := 0
	for {
		if line, rest, err = nextLine(rest); err != nil {
			return r, b, err
		}
		if line == "" {
			break
		}
		if err := parseHeader(line, &r, &length); err != nil {
			return r, b, err
		}
	}
	if length > s.payload {
		return r, b, badRequest(fmt.Sprintf(
			"Request payload with size %d is larger than the limit of %d allowed by server.", length, s.payload))
	}
	if len(rest) < length {
		return r, b, errMore
	}
	r.hasBody, r.body = length > 0, bytes.Clone(rest[:length])
	return r, rest[length:], nil
}

// nextLine cuts a line off, which ends with CR LF.
func nextLine(b []byte) (line string, rest []byte, err error) {
	before, after, found := bytes.Cut(b, []byte("\r\n"))
	if len(before)+2 > maxLine {
		return "", nil, badRequest("Invalid header. Reason: Invalid content length. Header: " + string(before[:maxLine]))
	}
	if !found {
		return "", nil, errMore
	}
	return string(before), after, nil
}

func (s *server) requestLine(line string) (method, path string, err error) {
	method, line, ok := strings.Cut(line, " ")
	path, protocol, more := strings.Cut(line, " ")
	switch {
	case !ok || !more:
		return "", "", invalidRequest
	case method != "GET" && method != "PUT" && method != "PATCH" &&
		!(method == "DELETE" && s.version.atLeast(version{1, 16, 0})):
		return "", "", badRequest("Invalid HTTP Method: Unsupported HTTP method.")
	case path == "":
		return "", "", badRequest("Invalid URI: Empty URI not allowed.")
	case protocol != "HTTP/1.0" && protocol != "HTTP/1.1":
		return "", "", badRequest("Invalid HTTP Version: Unsupported HTTP version.")
	}
	return method, path, nil
}

// parseHeader notes what counts: a length, and whether the client waits for leave to send its body. A transfer encoding
// is understood and then not heeded: chunks are taken for the next request.
func parseHeader(line string, r *request, length *int) error {
	name, value, ok := strings.Cut(line, ":")
	if !ok {
		return badRequest("Invalid header. Reason: Header is incorrectly formatted. Key: " + line)
	}
	value = strings.TrimSpace(value)
	switch strings.ToLower(strings.TrimSpace(name)) {
	case "content-length":
		n, err := strconv.ParseUint(value, 10, 31)
		if err != nil {
			return badRequest("Invalid header. Reason: Invalid value. Key:Content-Length; Value: " + value)
		}
		*length = int(n)
	case "expect":
		r.expect = strings.EqualFold(value, "100-continue")
	case "accept-encoding":
		plain := strings.ReplaceAll(value, " ", "")
		if strings.Contains(plain, "identity;q=0") && !strings.Contains(plain, "identity;q=0.") ||
			strings.Contains(plain, "*;q=0") && !strings.Contains(plain, "identity") {
			return badRequest("Invalid header. Reason: Invalid value. Key:Accept-Encoding; Value:" + value)
		}
	}
	return nil
}
