package guest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	agentv1 "banger/api/agent/v1"
	"banger/internal/channel"
)

// SetTime steps the guest's clock. It is a word, which says its answer sooner than HTTP does.
func (c *Client) SetTime(ctx context.Context, r *agentv1.SetTimeRequest) (*agentv1.SetTimeResponse, error) {
	return ask(ctx, c, channel.WordSetTime, r, &agentv1.SetTimeResponse{}, c.AgentServiceClient.SetTime)
}

// Adopt tells a restored guest who it is. It is a word: usually the first that it hears.
func (c *Client) Adopt(ctx context.Context, r *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error) {
	return ask(ctx, c, channel.WordAdopt, r, &agentv1.AdoptResponse{}, c.AgentServiceClient.Adopt)
}

// errMute is a stream that ended without an answer: it broke, or the agent knows no words.
var errMute = errors.New("the stream ended without an answer")

// ask puts a question as a word, and by HTTP to an agent that knows none: one that was saved by an older build.
func ask[Request, Response proto.Message](ctx context.Context, c *Client, kind byte, r Request, to Response,
	byHTTP func(context.Context, Request) (Response, error),
) (Response, error) {
	var none Response
	question, err := proto.Marshal(r)
	if err != nil {
		return none, err
	}
	answer, err := c.exchange(ctx, kind, question)
	switch {
	case errors.Is(err, errMute) && ctx.Err() == nil:
		return byHTTP(ctx, r)
	case err != nil:
		return none, err
	}
	if err := proto.Unmarshal(answer, to); err != nil {
		return none, connect.NewError(connect.CodeInternal, fmt.Errorf("the agent's answer: %w", err))
	}
	return to, nil
}

// exchange puts one question, on a stream of its own.
func (c *Client) exchange(ctx context.Context, kind byte, question []byte) ([]byte, error) {
	stream, err := c.open(ctx)
	if err != nil {
		return nil, unanswered(ctx, err)
	}
	defer stream.Close()
	defer context.AfterFunc(ctx, func() { _ = stream.SetDeadline(time.Unix(1, 0)) })()
	code, answer, err := say(stream, kind, question)
	if err != nil {
		return nil, unanswered(ctx, errors.Join(errMute, err))
	}
	if code != 0 {
		return nil, connect.NewError(connect.Code(code), errors.New(string(answer)))
	}
	return answer, nil
}

func say(stream net.Conn, kind byte, question []byte) (code byte, answer []byte, err error) {
	if err := channel.WriteWord(stream, channel.WordsPreface, kind, question); err != nil {
		return 0, nil, err
	}
	return channel.ReadWord(stream)
}

// unanswered tells why there is no answer, by the codes of questions that HTTP carries.
func unanswered(ctx context.Context, err error) error {
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, ctx.Err())
	case ctx.Err() != nil:
		return connect.NewError(connect.CodeCanceled, ctx.Err())
	}
	return connect.NewError(connect.CodeUnavailable, err)
}
