package serve

import (
	"context"
	"errors"
	"fmt"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
)

// Words returns what answers words, by h's methods; see agentv1.Word. What is asked runs until ctx ends.
func Words(ctx context.Context, h agentv1connect.AgentServiceHandler) func(kind byte, question []byte) (code byte, answer []byte, after func()) {
	return func(kind byte, question []byte) (byte, []byte, func()) {
		var later []func()
		after := func() {
			for _, f := range later {
				f()
			}
		}
		answer, err := answerWord(context.WithValue(ctx, laterKey{}, &later), h, agentv1.Word(kind), question)
		if err != nil {
			return byte(connect.CodeOf(err)), []byte(message(err)), after
		}
		return 0, answer, after
	}
}

func message(err error) string {
	if said := new(connect.Error); errors.As(err, &said) {
		return said.Message()
	}
	return err.Error()
}

func answerWord(ctx context.Context, h agentv1connect.AgentServiceHandler, kind agentv1.Word, question []byte) ([]byte, error) {
	switch kind {
	case agentv1.Word_WORD_SET_TIME:
		return call(ctx, question, &agentv1.SetTimeRequest{}, h.SetTime)
	case agentv1.Word_WORD_ADOPT:
		return call(ctx, question, &agentv1.AdoptRequest{}, h.Adopt)
	case agentv1.Word_WORD_PING:
		return call(ctx, question, &agentv1.PingRequest{}, h.Ping)
	case agentv1.Word_WORD_AWAIT_SSH:
		return call(ctx, question, &agentv1.AwaitSSHRequest{}, h.AwaitSSH)
	}
	return nil, connect.NewError(connect.CodeUnimplemented, fmt.Errorf("this agent does not know word %d", kind))
}

func call[Request, Response proto.Message](ctx context.Context, question []byte, r Request,
	f func(context.Context, Request) (Response, error),
) ([]byte, error) {
	if err := proto.Unmarshal(question, r); err != nil {
		return nil, connect.NewError(connect.CodeInvalidArgument, err)
	}
	response, err := f(ctx, r)
	if err != nil {
		return nil, err
	}
	return proto.Marshal(response)
}

type laterKey struct{}

// answerTime is what an answer over HTTP has to go out in before what was put off begins. The call's context ends when its
// handler returns, with the answer still to be written, and net/http does not say when it was.
const answerTime = 20 * time.Millisecond

// Later does something once the answer to the question whose context it is has been sent. Over HTTP that is as good as
// sure, no more: the host has to bear that a machine ends without an answer.
func Later(ctx context.Context, f func()) {
	if later, ok := ctx.Value(laterKey{}).(*[]func()); ok {
		*later = append(*later, f)
		return
	}
	context.AfterFunc(ctx, func() { time.AfterFunc(answerTime, f) })
}
