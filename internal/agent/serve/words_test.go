package serve_test

import (
	"context"
	"errors"
	"testing"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/serve"
)

func TestWords(t *testing.T) {
	var order []string
	listens := []bool{false, false, true}
	answer := serve.Words(t.Context(), serve.New(serve.Options{
		Adopt: func(ctx context.Context, _ *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error) {
			serve.Later(ctx, func() { order = append(order, "later") })
			order = append(order, "adopt")
			return &agentv1.AdoptResponse{Late: true}, nil
		},
		SSHListens: func() (now bool, err error) {
			if len(listens) == 0 {
				return false, errors.New("asked too often")
			}
			now, listens = listens[0], listens[1:]
			return now, nil
		},
	}))
	ask := func(kind agentv1.Word, question, to proto.Message) connect.Code {
		b, err := proto.Marshal(question)
		if err != nil {
			t.Fatal(err)
		}
		code, said, after := answer(byte(kind), b)
		order = append(order, "answered")
		after()
		if code == 0 {
			err = proto.Unmarshal(said, to)
		}
		if err != nil || code != 0 && len(said) == 0 {
			t.Errorf("%v: %d %q, %v", kind, code, said, err)
		}
		return connect.Code(code)
	}
	var adopted agentv1.AdoptResponse
	code := ask(agentv1.Word_WORD_ADOPT, &agentv1.AdoptRequest{Entropy: make([]byte, 32)}, &adopted)
	if code != 0 || !adopted.GetLate() || len(order) != 3 || order[0] != "adopt" || order[2] != "later" {
		t.Errorf("%v, %v, %v", code, &adopted, order)
	}
	if code := ask(agentv1.Word_WORD_ADOPT, &agentv1.AdoptRequest{}, &adopted); code != connect.CodeInvalidArgument {
		t.Errorf("without entropy: %v", code)
	}
	if code := ask(agentv1.Word_WORD_SET_TIME, &agentv1.SetTimeRequest{}, &agentv1.SetTimeResponse{}); code != connect.CodeUnimplemented {
		t.Errorf("no clock: %v", code)
	}
	if code := ask(99, &agentv1.SetTimeRequest{}, &agentv1.SetTimeResponse{}); code != connect.CodeUnimplemented {
		t.Errorf("unknown: %v", code)
	}
	var ssh agentv1.AwaitSSHResponse
	if code := ask(agentv1.Word_WORD_AWAIT_SSH, &agentv1.AwaitSSHRequest{WaitMillis: 1000}, &ssh); code != 0 || !ssh.GetListens() {
		t.Errorf("ssh: %v, %v", code, &ssh)
	}
	if code, _, _ := answer(byte(agentv1.Word_WORD_PING), []byte{0xff}); connect.Code(code) != connect.CodeInvalidArgument {
		t.Errorf("garbled: %v", code)
	}
}

// Over HTTP the answer does not wait for what is left to do, and that begins when the answer is there.
func TestLaterOverHTTP(t *testing.T) {
	begun, answered, done := make(chan struct{}), make(chan struct{}), make(chan struct{})
	client, _ := start(t, serve.Options{Adopt: func(ctx context.Context, _ *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error) {
		serve.Later(ctx, func() {
			close(begun)
			<-answered // for ever, if the answer waited for it
			close(done)
		})
		select {
		case <-begun:
			t.Error("it began before the answer")
		default:
		}
		return &agentv1.AdoptResponse{Late: true}, nil
	}})
	r, err := client.Adopt(within(t), &agentv1.AdoptRequest{Entropy: make([]byte, 32)})
	if err != nil || !r.GetLate() {
		t.Errorf("%v, %v", r, err)
	}
	close(answered)
	<-done
}
