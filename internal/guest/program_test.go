package guest

import (
	"context"
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
			var h2 http.Protocols
			h2.SetUnencryptedHTTP2(true)
			_, handler := agentv1connect.NewAgentServiceHandler(p)
			l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
			if err != nil {
				t.Fatal(err)
			}
			server := &http.Server{Handler: handler, Protocols: &h2}
			go func() { _ = server.Serve(l) }()
			defer server.Close()
			client := NewClient(func(ctx context.Context) (net.Conn, error) {
				return (&net.Dialer{}).DialContext(ctx, "unix", l.Addr().String())
			})
			defer client.Close()
			err = client.Succeed(t.Context(), "modprobe", "m")
			if strings.Join(p.argv, " ") != "modprobe m" {
				t.Errorf("it ran %q", p.argv)
			}
			if (err != nil) != c.fails || err != nil && (fault.KindOf(err) != c.kind || !strings.Contains(err.Error(), c.word) || len(err.Error()) > 2<<10) {
				t.Errorf("%v: %.300v", fault.KindOf(err), err)
			}
		})
	}
}
