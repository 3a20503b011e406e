package serve

import (
	"context"
	"errors"
	"io"
	"sync"
	"syscall"

	"connectrpc.com/connect"

	agentv1 "banger/api/agent/v1"
)

const (
	maxChunk    = 64 << 10 // bytes of output in one message
	stdinQueue  = 16       // messages of input a program may be behind
	eventsQueue = 16       // resizes or signals it may be behind
	maxSignal   = 64
)

type execStream = connect.BidiStream[agentv1.ExecRequest, agentv1.ExecResponse]

// Exec runs one program.
func (s *service) Exec(ctx context.Context, stream *execStream) error {
	first, err := stream.Receive()
	if err != nil {
		return err
	}
	start := first.GetStart()
	if start == nil {
		return connect.NewError(connect.CodeInvalidArgument, errors.New("the first request of exec must say what to start"))
	}
	if s.o.Runner == nil {
		return unimplemented()
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if s.o.Ready != nil {
		s.o.Ready(ctx)
	}
	in := &input{
		ctx: ctx, stdin: make(chan []byte, stdinQueue),
		resize: make(chan Size, eventsQueue), signals: make(chan syscall.Signal, eventsQueue),
	}
	out := &output{stream: stream}
	p := Program{
		Argv: start.GetArgv(), Env: start.GetEnv(), Dir: start.GetCwd(), User: start.GetUser(),
		Terminal: size(start.GetTerminal()), Resize: in.resize, Signals: in.signals,
		Stdout: chunks{out, stdout}, Stderr: chunks{out, stderr},
		Started: func(pid int) {
			_ = out.send(&agentv1.ExecResponse{Output: &agentv1.ExecResponse_Started{ // a lost client ends ctx
				Started: &agentv1.ExecStarted{Pid: int32(pid)},
			}})
		},
	}
	if start.GetStdin() {
		p.Stdin = in
	}
	// The loop ends with the stream: at the latest when this handler has returned.
	go in.receive(stream)
	exit := s.o.Runner.Run(ctx, p)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return out.send(&agentv1.ExecResponse{Output: &agentv1.ExecResponse_Exited{Exited: &agentv1.ExecExited{
		Code: int32(exit.Code), Signal: int32(exit.Signal), Error: exit.Error,
	}}})
}

func size(t *agentv1.TerminalSize) *Size {
	if t == nil {
		return nil
	}
	return &Size{Rows: uint16(min(t.GetRows(), 0xffff)), Columns: uint16(min(t.GetColumns(), 0xffff))}
}

// output sends messages from several goroutines.
type output struct {
	mu     sync.Mutex
	stream *execStream
}

func (o *output) send(r *agentv1.ExecResponse) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.stream.Send(r)
}

func stdout(p []byte) *agentv1.ExecResponse {
	return &agentv1.ExecResponse{Output: &agentv1.ExecResponse_Stdout{Stdout: p}}
}

func stderr(p []byte) *agentv1.ExecResponse {
	return &agentv1.ExecResponse{Output: &agentv1.ExecResponse_Stderr{Stderr: p}}
}

// chunks writes to one of the program's outputs.
type chunks struct {
	out  *output
	wrap func([]byte) *agentv1.ExecResponse
}

func (c chunks) Write(p []byte) (int, error) {
	sent := 0
	for sent < len(p) {
		n := min(len(p)-sent, maxChunk)
		if err := c.out.send(c.wrap(p[sent : sent+n])); err != nil {
			return sent, err
		}
		sent += n
	}
	return sent, nil
}

// input is what the client sends after the start. Everything comes on one stream in order: a program that does
// not read its stdin holds up the signals behind it once the queue is full.
type input struct {
	ctx     context.Context
	stdin   chan []byte // closed at the end of input
	rest    []byte
	resize  chan Size
	signals chan syscall.Signal
}

func (in *input) receive(stream *execStream) {
	eof := sync.OnceFunc(func() { close(in.stdin) })
	ended := false
	for {
		r, err := stream.Receive()
		if err != nil {
			eof()
			return
		}
		switch m := r.GetInput().(type) {
		case *agentv1.ExecRequest_Stdin:
			if !ended && len(m.Stdin) > 0 {
				put(in.ctx, in.stdin, m.Stdin)
			}
		case *agentv1.ExecRequest_StdinEof:
			ended = true
			eof()
		case *agentv1.ExecRequest_Resize:
			if to := size(m.Resize); to != nil {
				put(in.ctx, in.resize, *to)
			}
		case *agentv1.ExecRequest_Signal:
			if m.Signal > 0 && m.Signal <= maxSignal {
				put(in.ctx, in.signals, syscall.Signal(m.Signal))
			}
		}
	}
}

func put[T any](ctx context.Context, c chan<- T, v T) {
	select {
	case c <- v:
	case <-ctx.Done():
	}
}

// Read is the program's stdin.
func (in *input) Read(p []byte) (int, error) {
	if len(in.rest) == 0 {
		select {
		case chunk, ok := <-in.stdin:
			if !ok {
				return 0, io.EOF
			}
			in.rest = chunk
		case <-in.ctx.Done():
			return 0, in.ctx.Err()
		}
	}
	n := copy(p, in.rest)
	in.rest = in.rest[n:]
	return n, nil
}
