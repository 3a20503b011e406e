package serve

import (
	"context"
	"errors"
	"fmt"
	"net/http"

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

// laterKey is the key of what is left to do after a word, answeredKey that of the context which ends with an answer by HTTP.
type laterKey struct{}

type answeredKey struct{}

// withAnswers serves by h, and lets Later know when an answer is with the connection: the request's context ends then. What
// h derives of it for a caller with a deadline ends as soon as the handler returns, before anything is written.
func withAnswers(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx := r.Context()
		h.ServeHTTP(w, r.WithContext(context.WithValue(ctx, answeredKey{}, ctx)))
	})
}

// Later does something once the answer to the question whose context it is has been sent. Of one over HTTP the last bytes
// may still be on their way to the pipe: who ends the machine leaves them a moment.
func Later(ctx context.Context, f func()) {
	if later, ok := ctx.Value(laterKey{}).(*[]func()); ok {
		*later = append(*later, f)
		return
	}
	if answered, ok := ctx.Value(answeredKey{}).(context.Context); ok {
		ctx = answered
	}
	context.AfterFunc(ctx, f)
}
