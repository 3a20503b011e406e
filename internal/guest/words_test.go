package guest

import (
	"context"
	"errors"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/channel"
)

// byHTTP answers with a build that says how it was asked.
type byHTTP struct {
	agentv1connect.AgentServiceClient
}

func (byHTTP) Ping(context.Context, *agentv1.PingRequest) (*agentv1.PingResponse, error) {
	return &agentv1.PingResponse{Build: "http"}, nil
}

func TestWordsAndWithoutThem(t *testing.T) {
	word, err := proto.Marshal(&agentv1.PingResponse{Build: "word"})
	if err != nil {
		t.Fatal(err)
	}
	says := func(code byte, answer []byte, err error) Say {
		return func(context.Context, byte, []byte) (byte, []byte, error) { return code, answer, err }
	}
	broken := errors.New("the pipe broke")
	for name, c := range map[string]struct {
		say  Say
		want string
		code connect.Code
	}{
		"no words":       {nil, "http", 0},
		"a word":         {says(0, word, nil), "word", 0},
		"mute":           {says(0, nil, errors.Join(channel.ErrMute, broken)), "http", 0},
		"broken":         {says(0, nil, broken), "", connect.CodeUnavailable},
		"failure":        {says(byte(connect.CodeUnimplemented), []byte("cannot"), nil), "", connect.CodeUnimplemented},
		"garbled answer": {says(0, []byte{0xff}, nil), "", connect.CodeInternal},
	} {
		client := (&Client{AgentServiceClient: byHTTP{}}).WithWords(c.say)
		pong, err := client.Ping(t.Context(), &agentv1.PingRequest{})
		if pong.GetBuild() != c.want || c.want == "" && connect.CodeOf(err) != c.code || c.want != "" && err != nil {
			t.Errorf("%s: %v, %v", name, pong, err)
		}
	}
	over, cancel := context.WithCancel(t.Context())
	cancel()
	client := (&Client{AgentServiceClient: byHTTP{}}).WithWords(says(0, nil, channel.ErrMute))
	if _, err := client.Ping(over, &agentv1.PingRequest{}); connect.CodeOf(err) != connect.CodeCanceled {
		t.Errorf("over: %v", err)
	}
}

// An agent that knows no words would end all its streams at each: it is asked as a word until it answered otherwise.
func TestMuteAgentIsNotAskedAgain(t *testing.T) {
	said := 0
	agent := &sometimes{}
	client := (&Client{AgentServiceClient: agent}).WithWords(func(context.Context, byte, []byte) (byte, []byte, error) {
		said++
		return 0, nil, channel.ErrMute
	})
	for range 3 { // it is not there yet, and may know words
		if _, err := client.Ping(t.Context(), &agentv1.PingRequest{}); err == nil {
			t.Fatal("an agent that is not there has answered")
		}
	}
	agent.there = true
	for range 3 {
		if _, err := client.Ping(t.Context(), &agentv1.PingRequest{}); err != nil {
			t.Fatal(err)
		}
	}
	if said != 4 {
		t.Errorf("asked by %d words, want 4", said)
	}
	client.mute.Store(false)
	for range 2 { // what an agent cannot do is an answer, too
		if _, err := client.AwaitSSH(t.Context(), &agentv1.AwaitSSHRequest{}); connect.CodeOf(err) != connect.CodeUnimplemented {
			t.Fatal(err)
		}
	}
	if said != 5 {
		t.Errorf("asked by %d words, want 5", said)
	}
}

// sometimes is an agent that is there or not.
type sometimes struct {
	byHTTP
	there bool
}

func (*sometimes) AwaitSSH(context.Context, *agentv1.AwaitSSHRequest) (*agentv1.AwaitSSHResponse, error) {
	return nil, connect.NewWireError(connect.CodeUnimplemented, errors.New("what is that"))
}

func (s *sometimes) Ping(ctx context.Context, r *agentv1.PingRequest) (*agentv1.PingResponse, error) {
	if !s.there {
		return nil, errors.New("nobody is there")
	}
	return s.byHTTP.Ping(ctx, r)
}
