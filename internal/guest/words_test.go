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
