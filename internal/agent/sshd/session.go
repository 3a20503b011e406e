package sshd

import (
	"context"
	"encoding/binary"
	"net"
	"strings"
	"sync"
	"syscall"

	"golang.org/x/crypto/ssh"

	"banger/internal/agent/serve"
)

// maxEnvironment bounds the variables a client sets.
const maxEnvironment = 64

// connected is a client that has been let in.
type connected struct {
	Options
	client *ssh.ServerConn

	mu       sync.Mutex
	forwards map[string]net.Listener // by address
}

// session is a channel on which one program runs (RFC 4254, 6).
type session struct {
	c       *connected
	channel ssh.Channel
	env     []string
	size    *serve.Size // nil: no terminal
	resize  chan serve.Size
	signals chan syscall.Signal
	started bool
}

func (c *connected) session(ctx context.Context, asked ssh.NewChannel) {
	channel, requests, err := asked.Accept()
	if err != nil {
		return
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s := &session{c: c, channel: channel, resize: make(chan serve.Size, 1), signals: make(chan syscall.Signal, 8)}
	var running sync.WaitGroup
	for r := range requests {
		program, ok := s.take(r)
		if r.WantReply {
			_ = r.Reply(ok, nil) // a client that is gone ends the loop
		}
		if program != nil {
			running.Go(func() { s.run(ctx, *program) })
		}
	}
	cancel() // the client closed the channel: nobody waits for the program
	running.Wait()
	_ = channel.Close()
}

// take serves a request. It returns the program to run when it asks for one.
func (s *session) take(r *ssh.Request) (*serve.Program, bool) {
	switch r.Type {
	case "pty-req":
		return nil, s.terminal(r.Payload)
	case "window-change":
		return nil, s.resized(r.Payload)
	case "env":
		var v struct{ Name, Value string }
		if ssh.Unmarshal(r.Payload, &v) != nil || !accepted(v.Name) || len(s.env) >= maxEnvironment {
			return nil, false
		}
		s.env = append(s.env, v.Name+"="+v.Value)
		return nil, true
	case "signal":
		var v struct{ Name string }
		var number syscall.Signal
		known := false
		if ssh.Unmarshal(r.Payload, &v) == nil {
			number, known = signals[v.Name]
		}
		if known {
			select {
			case s.signals <- number:
			default: // a program that minds none of them
			}
		}
		return nil, known
	case "shell", "exec", "subsystem":
		return s.program(r)
	}
	return nil, false
}

// accepted are the variables that sshd takes by default on Debian, and what terminals tell of their colours.
func accepted(name string) bool {
	return name == "LANG" || name == "COLORTERM" || name == "NO_COLOR" || strings.HasPrefix(name, "LC_")
}

func (s *session) terminal(payload []byte) bool {
	var v struct {
		Term                         string
		Columns, Rows, Width, Height uint32
		Modes                        string
	}
	if ssh.Unmarshal(payload, &v) != nil || s.started {
		return false
	}
	s.size = &serve.Size{Rows: uint16(v.Rows), Columns: uint16(v.Columns)}
	if v.Term != "" {
		s.env = append(s.env, "TERM="+v.Term)
	}
	return true
}

func (s *session) resized(payload []byte) bool {
	if len(payload) < 8 || s.size == nil {
		return false
	}
	size := serve.Size{Columns: uint16(binary.BigEndian.Uint32(payload)), Rows: uint16(binary.BigEndian.Uint32(payload[4:]))}
	for {
		select {
		case s.resize <- size:
			return true
		default:
		}
		select {
		case <-s.resize: // an older size that nobody needs any more
		default:
		}
	}
}

// program makes the program of a request; a session runs one.
func (s *session) program(r *ssh.Request) (*serve.Program, bool) {
	var v struct{ Line string }
	if s.started || r.Type != "shell" && ssh.Unmarshal(r.Payload, &v) != nil {
		return nil, false
	}
	p := &serve.Program{
		User: s.c.client.User(), Env: s.env, Terminal: s.size, Resize: s.resize, Signals: s.signals,
		Stdin: s.channel, Stdout: s.channel, Stderr: s.channel.Stderr(),
	}
	switch {
	case r.Type == "exec":
		a, err := s.c.Account(p.User)
		if err != nil {
			return nil, false
		}
		p.Argv = []string{a.Shell, "-c", v.Line}
	case r.Type == "subsystem" && v.Line == "sftp" && len(s.c.SFTP) > 0:
		p.Argv, p.Terminal = s.c.SFTP, nil
	case r.Type == "subsystem":
		return nil, false
	}
	s.started = true
	return p, true
}

// run runs the program and tells how it ended.
func (s *session) run(ctx context.Context, p serve.Program) {
	exit := s.c.Runner.Run(ctx, p)
	if exit.Error != "" {
		_, _ = s.channel.Stderr().Write([]byte("banger: " + exit.Error + "\n")) // the client may be gone, here and below
	}
	_ = s.channel.CloseWrite()
	if name := nameOf(exit.Signal); name != "" {
		_, _ = s.channel.SendRequest("exit-signal", false, ssh.Marshal(struct {
			Name    string
			Dumped  bool
			Message string
			Lang    string
		}{Name: name}))
	} else {
		_, _ = s.channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{uint32(exit.Code)}))
	}
	_ = s.channel.Close()
}

// signals are those that have a name in SSH (RFC 4254, 6.10).
var signals = map[string]syscall.Signal{
	"ABRT": syscall.SIGABRT, "ALRM": syscall.SIGALRM, "FPE": syscall.SIGFPE, "HUP": syscall.SIGHUP, "ILL": syscall.SIGILL,
	"INT": syscall.SIGINT, "KILL": syscall.SIGKILL, "PIPE": syscall.SIGPIPE, "QUIT": syscall.SIGQUIT, "SEGV": syscall.SIGSEGV,
	"TERM": syscall.SIGTERM, "USR1": syscall.SIGUSR1, "USR2": syscall.SIGUSR2,
}

func nameOf(signal syscall.Signal) string {
	for name, s := range signals {
		if s == signal {
			return name
		}
	}
	return ""
}
