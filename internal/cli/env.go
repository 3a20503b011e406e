package cli

import (
	"context"
	"io"
	"os"
	"time"

	"golang.org/x/term"

	"banger/internal/client"
	"banger/internal/fault"
	"banger/internal/paths"
)

// Env is the world of one invocation. Tests make their own.
type Env struct {
	Args   []string // without the program's name
	Stdin  io.Reader
	Stdout io.Writer
	Stderr io.Writer
	Getenv func(string) string
	Paths  paths.Paths
	Now    func() time.Time

	// Dial reaches the daemon, and starts it first when autoStart says so.
	Dial func(ctx context.Context, autoStart bool) (*client.Client, error)

	quiet   bool
	timeout time.Duration // as asked with --timeout; 0 means the command's own
	signals *interrupts   // nil in tests that send none
}

// FromOS returns the world of this process.
func FromOS() *Env {
	e := &Env{
		Args: os.Args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Getenv: os.Getenv, Paths: paths.FromEnvironment(), Now: time.Now,
	}
	e.Dial = e.dialDaemon
	return e
}

func (e *Env) dialDaemon(ctx context.Context, autoStart bool) (*client.Client, error) {
	return client.Dial(ctx, client.Options{Paths: e.Paths, AutoStart: autoStart, Notice: e.notice})
}

// isTerminal tells whether stream is a terminal.
func isTerminal(stream any) bool {
	f, ok := stream.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// colour tells whether what goes to w may carry colours: https://no-color.org.
func (e *Env) colour(w io.Writer) bool {
	return e.Getenv("NO_COLOR") == "" && e.Getenv("TERM") != "dumb" && isTerminal(w)
}

// withTimeout bounds a command: by --timeout when given, else by the command's own limit.
// The error after its end says how long was waited.
func (e *Env) withTimeout(ctx context.Context, own time.Duration) (context.Context, context.CancelFunc) {
	limit := own
	if e.timeout > 0 {
		limit = e.timeout
	}
	cause := fault.New(fault.Timeout, "gave up after %s", limit).
		WithHint("give it longer with --timeout; \"banger daemon logs\" tells what it waits for")
	return context.WithTimeoutCause(ctx, limit, cause)
}

// within runs f bounded by a time limit, and says so when it was reached.
func (e *Env) within(ctx context.Context, own time.Duration, f func(context.Context) error) error {
	ctx, cancel := e.withTimeout(ctx, own)
	defer cancel()
	return explain(ctx, f(ctx))
}

// quickly is connected for what takes a moment.
func (e *Env) quickly(ctx context.Context, f func(context.Context, *client.Client) error) error {
	return e.connected(ctx, quickLimit, f)
}

// connected is within, with a connection to the daemon.
func (e *Env) connected(ctx context.Context, own time.Duration, f func(context.Context, *client.Client) error) error {
	return e.within(ctx, own, func(ctx context.Context) error {
		c, err := e.connect(ctx)
		if err != nil {
			return err
		}
		defer c.Close()
		return f(ctx, c)
	})
}

// connect dials the daemon, starting it when needed.
func (e *Env) connect(ctx context.Context) (*client.Client, error) {
	return e.Dial(ctx, true)
}

// Time limits of commands. Booting a guest under software emulation on a busy machine takes minutes.
const (
	quickLimit = time.Minute
	stopLimit  = 5 * time.Minute
	saveLimit  = 15 * time.Minute // large memories on slow disks
	bootLimit  = 15 * time.Minute
	setupLimit = 2 * time.Hour
)
