package guest

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"connectrpc.com/connect"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/fault"
)

// player plays programs: it answers with what it was made with, and ends.
type player struct {
	agentv1connect.UnimplementedAgentServiceHandler
	answers []*agentv1.ExecResponse
	argv    []string
}

func (p *player) Exec(_ context.Context, s *connect.BidiStream[agentv1.ExecRequest, agentv1.ExecResponse]) error {
	r, err := s.Receive()
	if err != nil {
		return err
	}
	p.argv = r.GetStart().GetArgv()
	for _, a := range p.answers {
		if err := s.Send(a); err != nil {
			return err
		}
	}
	return nil
}

// client returns one that the player answers.
func (p *player) client(t *testing.T) *Client {
	t.Helper()
	var h2 http.Protocols
	h2.SetUnencryptedHTTP2(true)
	_, handler := agentv1connect.NewAgentServiceHandler(p)
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: handler, Protocols: &h2}
	go func() { _ = server.Serve(l) }()
	t.Cleanup(func() { _ = server.Close() })
	client := NewClient(func(ctx context.Context) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", l.Addr().String())
	})
	t.Cleanup(client.Close)
	return client
}

func exited(code int32, why string) *agentv1.ExecResponse {
	return &agentv1.ExecResponse{Output: &agentv1.ExecResponse_Exited{Exited: &agentv1.ExecExited{Code: code, Error: why}}}
}

func complains(text string) *agentv1.ExecResponse {
	return &agentv1.ExecResponse{Output: &agentv1.ExecResponse_Stderr{Stderr: []byte(text)}}
}

// Nothing but success is success, and what a program complains of is told, not endlessly.
func TestSucceed(t *testing.T) {
	for name, c := range map[string]struct {
		answers []*agentv1.ExecResponse
		fails   bool
		kind    fault.Kind
		word    string
	}{
		"success":      {[]*agentv1.ExecResponse{complains("a warning"), exited(0, "")}, false, fault.Unexpected, ""},
		"failure":      {[]*agentv1.ExecResponse{complains("no\nsuch"), complains(" module\xff"), exited(1, "")}, true, fault.Precondition, "status 1: no such module?"},
		"not there":    {[]*agentv1.ExecResponse{exited(127, "not found")}, true, fault.Precondition, "not found"},
		"talkative":    {[]*agentv1.ExecResponse{complains(strings.Repeat("x", 100<<10)), complains("y"), exited(2, "")}, true, fault.Precondition, "xxx"},
		"breaks off":   {[]*agentv1.ExecResponse{complains("x")}, true, fault.Unexpected, "EOF"},
		"says nothing": {nil, true, fault.Unexpected, "EOF"},
		"killed":       {[]*agentv1.ExecResponse{exited(137, "")}, true, fault.Precondition, "status 137"},
	} {
		t.Run(name, func(t *testing.T) {
			p := &player{answers: c.answers}
			err := p.client(t).Succeed(t.Context(), "modprobe", "m")
			if strings.Join(p.argv, " ") != "modprobe m" {
				t.Errorf("it ran %q", p.argv)
			}
			if (err != nil) != c.fails || err != nil && (fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.word) || len(err.Error()) > 2<<10) {
				t.Errorf("%v: %.300v", fault.KindOf(err), err)
			}
		})
	}
}

func says(text string) *agentv1.ExecResponse {
	return &agentv1.ExecResponse{Output: &agentv1.ExecResponse_Stdout{Stdout: []byte(text)}}
}

// choosy takes so many bytes, and no more.
type choosy struct {
	strings.Builder
	room int
}

var errFull = errors.New("full")

func (c *choosy) Write(p []byte) (int, error) {
	if c.Len()+len(p) > c.room {
		return 0, errFull
	}
	return c.Builder.Write(p)
}

// An output is whole only when its program succeeded.
func TestRun(t *testing.T) {
	failed := &ExitError{Code: 2}
	for name, c := range map[string]struct {
		answers      []*agentv1.ExecResponse
		room         int
		want         error
		said, warned string
	}{
		"success":        {[]*agentv1.ExecResponse{says("a"), complains("w"), says("b"), exited(0, "")}, 10, nil, "ab", "w"},
		"failure":        {[]*agentv1.ExecResponse{says("a"), complains("w"), exited(2, "")}, 10, failed, "a", "w"},
		"breaks off":     {[]*agentv1.ExecResponse{says("a"), says("b")}, 10, io.ErrUnexpectedEOF, "ab", ""},
		"nobody takes":   {[]*agentv1.ExecResponse{says("aa"), says("bb"), exited(0, "")}, 3, errFull, "aa", ""},
		"does not start": {[]*agentv1.ExecResponse{exited(127, "no such file")}, 3, &ExitError{Code: 127, Why: "no such file"}, "", ""},
	} {
		t.Run(name, func(t *testing.T) {
			out, warnings := &choosy{room: c.room}, &strings.Builder{}
			err := Run(t.Context(), (&player{answers: c.answers}).client(t), out, warnings, "x")
			if exit := new(ExitError); errors.As(err, &exit) {
				if want, ok := c.want.(*ExitError); !ok || *exit != *want {
					t.Errorf("%+v", exit)
				}
			} else if !errors.Is(err, c.want) {
				t.Error(err)
			}
			if out.String() != c.said || warnings.String() != c.warned {
				t.Errorf("%q, %q", out, warnings)
			}
		})
	}
}
