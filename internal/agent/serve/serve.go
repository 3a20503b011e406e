// Package serve is the agent's service: the handler of agent.v1.AgentService and the HTTP/2 server it
// is reached by. It knows neither where its listener comes from nor how programs are run, so that the
// fake VMM answers with the same code as a guest.
package serve

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"strconv"
	"strings"
	"syscall"
	"time"

	"connectrpc.com/connect"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/build"
)

// maxRequest bounds one message from the host; stdin comes in smaller pieces.
const maxRequest = 4 << 20

// Options is what the service needs of its surroundings. A nil function is answered with "unimplemented".
type Options struct {
	Runner Runner
	// Shutdown begins a power-off or reboot and returns at once.
	Shutdown func(context.Context, agentv1.ShutdownRequest_Mode) error
	// SetTime steps the clock and tells by how much; positive when the clock was behind.
	SetTime func(time.Time) (step time.Duration, err error)
	// StepTime moves the clock forward by so much, or back.
	StepTime func(time.Duration) error
	// Status looks at the guest from inside.
	Status func(context.Context) (*agentv1.StatusResponse, error)
	// Quiesce makes the guest ready to be saved. It heeds its context, also when a disk does not answer.
	Quiesce func(context.Context, *agentv1.QuiesceRequest) (*agentv1.QuiesceResponse, error)
	// Adopt makes a guest that was restored from memory what the request says.
	Adopt func(context.Context, *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error)
	// SSHListens tells whether the guest's SSH server listens, and knows whose it is.
	SSHListens func() (bool, error)
	// Dial connects to a port of the guest itself, and tells by which address.
	Dial func(ctx context.Context, port uint16) (Conn, string, error)
	// BootID is that of the running kernel, as programs see it; empty: the kernel's is read at each Ping.
	BootID string
	// Ready, when set, returns once the guest is far enough for programs to be started in it, or ctx ends.
	Ready func(context.Context)
}

// Runner runs programs.
type Runner interface {
	// Run runs p to its end and returns when all its output has been written. When ctx ends, the program is
	// hung up on and soon killed: its caller has gone, also when the guest was saved meanwhile and goes on in another
	// process. What is to live on is started in a session of its own, as under SSH. After Run returned, Stdin may still be read until ctx ends; nothing else of p is used.
	Run(ctx context.Context, p Program) Exit
}

// Program is a program to run, as in ExecStart.
type Program struct {
	Argv     []string // empty: the user's login shell
	Env      []string // NAME=value, added to the login environment
	Dir      string   // empty: the user's home
	User     string   // name or number; empty: root
	Terminal *Size    // nil: no pseudo-terminal

	Stdin   io.Reader // nil: /dev/null, or a terminal that nobody types on
	Stdout  io.Writer
	Stderr  io.Writer             // unused with a terminal
	Resize  <-chan Size           // never closed
	Signals <-chan syscall.Signal // for the program's process group; never closed
	Started func(pid int)         // called once, before any output, unless the program cannot be started
}

// Size is that of a terminal, in characters.
type Size struct{ Rows, Columns uint16 }

// Exit is how a program ended.
type Exit struct {
	Code   int            // 128+Signal after a signal, 127 not found, 126 not executable
	Signal syscall.Signal // 0 when it exited by itself
	Error  string         // why it could not be started; empty otherwise
}

// New returns the handler of the service.
func New(o Options) agentv1connect.AgentServiceHandler { return &service{o} }

// Serve answers on l until ctx ends or l fails. It closes l and all connections.
func Serve(ctx context.Context, l net.Listener, h agentv1connect.AgentServiceHandler) error {
	mux := http.NewServeMux()
	// Compression costs more than the channel's bandwidth is worth.
	mux.Handle(agentv1connect.NewAgentServiceHandler(h,
		connect.WithReadMaxBytes(maxRequest), connect.WithCompression("gzip", nil, nil)))
	var protocols http.Protocols
	protocols.SetUnencryptedHTTP2(true)
	server := &http.Server{
		Handler: mux, Protocols: &protocols, ReadHeaderTimeout: 30 * time.Second,
		ErrorLog: log.New(io.Discard, "", 0),
	}
	stop := context.AfterFunc(ctx, func() { _ = server.Close() }) // Serve returns its error
	defer stop()
	err := server.Serve(l)
	if ctx.Err() != nil && errors.Is(err, http.ErrServerClosed) {
		return nil
	}
	return errors.Join(err, server.Close())
}

type service struct{ o Options }

func unimplemented() error {
	return connect.NewError(connect.CodeUnimplemented, errors.New("this agent cannot do that"))
}

// Ping answers.
func (s *service) Ping(context.Context, *agentv1.PingRequest) (*agentv1.PingResponse, error) {
	return &agentv1.PingResponse{
		Build: build.ID(), BootId: s.bootID(), UptimeSeconds: uptime(),
	}, nil
}

// bootID is read each time unless it is given: a restored guest gets another one.
func (s *service) bootID() string {
	if s.o.BootID != "" {
		return s.o.BootID
	}
	b, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "" // no kernel of ours to ask: nothing that a ping would fail for
	}
	return strings.TrimSpace(string(b))
}

// uptime returns the seconds since the kernel started; 0 when it does not say.
func uptime() float64 {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return 0
	}
	first, _, _ := strings.Cut(string(b), " ")
	seconds, _ := strconv.ParseFloat(first, 64) // 0 on error
	return seconds
}

// Status tells what the guest looks like.
func (s *service) Status(ctx context.Context, _ *agentv1.StatusRequest) (*agentv1.StatusResponse, error) {
	if s.o.Status == nil {
		return nil, unimplemented()
	}
	status, err := s.o.Status(ctx)
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return status, nil
}

// Shutdown begins a power-off or reboot.
func (s *service) Shutdown(ctx context.Context, r *agentv1.ShutdownRequest) (*agentv1.ShutdownResponse, error) {
	mode := r.GetMode()
	if mode != agentv1.ShutdownRequest_MODE_POWEROFF && mode != agentv1.ShutdownRequest_MODE_REBOOT {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("neither power-off nor reboot"))
	}
	if s.o.Shutdown == nil {
		return nil, unimplemented()
	}
	if err := s.o.Shutdown(ctx, mode); err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return &agentv1.ShutdownResponse{}, nil
}

// SetTime steps the clock.
func (s *service) SetTime(_ context.Context, r *agentv1.SetTimeRequest) (*agentv1.SetTimeResponse, error) {
	if r.GetUnixNanos() < 0 || r.GetUnixNanos() > 0 && r.GetStepNanos() != 0 {
		return nil, connect.NewError(connect.CodeInvalidArgument, errors.New("neither a time nor a step"))
	}
	if s.o.SetTime == nil || s.o.StepTime == nil {
		return nil, unimplemented()
	}
	step, err := time.Duration(r.GetStepNanos()), error(nil)
	switch {
	case r.GetUnixNanos() > 0:
		step, err = s.o.SetTime(time.Unix(0, r.GetUnixNanos()))
	case step != 0:
		err = s.o.StepTime(step)
	}
	if err != nil {
		return nil, connect.NewError(connect.CodeInternal, err)
	}
	return &agentv1.SetTimeResponse{StepNanos: int64(step), UnixNanos: time.Now().UnixNano()}, nil
}

// minEntropy is how many random bytes a restored guest gets at least: fewer would leave it guessable.
const minEntropy = 32

// Quiesce makes the guest ready to be saved.
func (s *service) Quiesce(ctx context.Context, r *agentv1.QuiesceRequest) (*agentv1.QuiesceResponse, error) {
	if s.o.Quiesce == nil {
		return nil, unimplemented()
	}
	return answer(s.o.Quiesce(ctx, r))
}

// Adopt tells a restored guest who it is.
func (s *service) Adopt(ctx context.Context, r *agentv1.AdoptRequest) (*agentv1.AdoptResponse, error) {
	if len(r.GetEntropy()) < minEntropy {
		return nil, connect.NewError(connect.CodeInvalidArgument, fmt.Errorf("%d bytes of entropy are less than %d", len(r.GetEntropy()), minEntropy))
	}
	if s.o.Adopt == nil {
		return nil, unimplemented()
	}
	return answer(s.o.Adopt(ctx, r))
}

const (
	sshWaitMost = time.Second // others want to be answered, too
	sshPoll     = 10 * time.Millisecond
)

// AwaitSSH waits for the guest's SSH server.
func (s *service) AwaitSSH(ctx context.Context, r *agentv1.AwaitSSHRequest) (*agentv1.AwaitSSHResponse, error) {
	if s.o.SSHListens == nil {
		return nil, unimplemented()
	}
	wait := min(time.Duration(r.GetWaitMillis())*time.Millisecond, sshWaitMost)
	for end := time.Now().Add(wait); ; {
		listens, err := s.o.SSHListens()
		if err != nil {
			return nil, failed(err)
		}
		if listens || time.Now().After(end) {
			return &agentv1.AwaitSSHResponse{Listens: listens}, nil
		}
		select {
		case <-ctx.Done():
			return nil, failed(ctx.Err())
		case <-time.After(sshPoll):
		}
	}
}

// answer tells a failure's kind.
func answer[T any](response *T, err error) (*T, error) {
	if err != nil {
		return nil, failed(err)
	}
	return response, nil
}

// failed tells a deadline from a failure.
func failed(err error) error {
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return connect.NewError(connect.CodeDeadlineExceeded, err)
	case errors.Is(err, context.Canceled):
		return connect.NewError(connect.CodeCanceled, err)
	}
	return connect.NewError(connect.CodeInternal, err)
}
