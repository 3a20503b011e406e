package guest

import (
	"context"
	"errors"
	"fmt"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/proto"

	agentv1 "banger/api/agent/v1"
	"banger/internal/channel"
)

// Say says a word to the agent, see channel.Host.Say.
type Say func(ctx context.Context, kind byte, question []byte) (code byte, answer []byte, err error)

// WithWords has questions that a guest may be asked first put as words, where the channel has them: a guest in software
// emulation that was just restored answers them in half the time.
func (c *Client) WithWords(say Say) *Client {
	c.say = say
	return c
}

// SetTime steps the guest's clock, or asks what it says.
func (c *Client) SetTime(ctx context.Context, r *agentv1.SetTimeRequest) (*agentv1.SetTimeResponse, error) {
	return ask(ctx, c, agentv1.Word_WORD_SET_TIME, r, &agentv1.SetTimeResponse{}, c.AgentServiceClient.SetTime)
}

// Adopt tells a restored guest who it is.
func (c *Client) Adopt(ctx context.Context, r *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error) {
	return ask(ctx, c, agentv1.Word_WORD_ADOPT, r, &agentv1.AdoptResponse{}, c.AgentServiceClient.Adopt)
}

// Ping asks whether the agent answers.
func (c *Client) Ping(ctx context.Context, r *agentv1.PingRequest) (*agentv1.PingResponse, error) {
	return ask(ctx, c, agentv1.Word_WORD_PING, r, &agentv1.PingResponse{}, c.AgentServiceClient.Ping)
}

// AwaitSSH waits until the guest's SSH server listens.
func (c *Client) AwaitSSH(ctx context.Context, r *agentv1.AwaitSSHRequest) (*agentv1.AwaitSSHResponse, error) {
	return ask(ctx, c, agentv1.Word_WORD_AWAIT_SSH, r, &agentv1.AwaitSSHResponse{}, c.AgentServiceClient.AwaitSSH)
}

// ask puts a question as a word; by HTTP where there are none, and to an agent that does not answer them: one that was
// saved by an older build. Such a one is asked once only: what it does not know ends its session, and with it all streams.
func ask[Request, Response proto.Message](ctx context.Context, c *Client, kind agentv1.Word, r Request, to Response,
	byHTTP func(context.Context, Request) (Response, error),
) (none Response, err error) {
	if c.say == nil || c.mute.Load() {
		return byHTTP(ctx, r)
	}
	question, err := proto.Marshal(r)
	if err != nil {
		return none, err
	}
	code, answer, err := c.say(ctx, byte(kind), question)
	switch {
	case errors.Is(err, channel.ErrMute) && ctx.Err() == nil:
		response, err := byHTTP(ctx, r)
		if err == nil || connect.IsWireError(err) {
			c.mute.Store(true)
		}
		return response, err
	case err != nil:
		return none, connect.NewError(unanswered(ctx), err)
	case code != 0:
		return none, connect.NewError(connect.Code(code), errors.New(string(answer)))
	}
	if err := proto.Unmarshal(answer, to); err != nil {
		return none, connect.NewError(connect.CodeInternal, fmt.Errorf("the agent's answer: %w", err))
	}
	return to, nil
}

// unanswered is the code that a question by HTTP fails with.
func unanswered(ctx context.Context) connect.Code {
	switch {
	case errors.Is(ctx.Err(), context.DeadlineExceeded):
		return connect.CodeDeadlineExceeded
	case ctx.Err() != nil:
		return connect.CodeCanceled
	}
	return connect.CodeUnavailable
}
