package daemon

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"syscall"
	"time"

	"gopkg.in/natefinch/lumberjack.v2"

	"banger/internal/build"
	"banger/internal/daemon/lock"
	"banger/internal/fault"
	"banger/internal/paths"
	"banger/internal/server"
	"banger/internal/system"
)

// Bounds of the daemon's own needs.
const (
	memoryLimit      = 32 << 20 // soft: what the garbage collector aims at
	logMegabytes     = 10       // size at which the log is rotated
	logBackups       = 3
	reconcileTimeout = 2 * time.Minute
)

// Options says what daemon to be.
type Options struct {
	Paths paths.Paths
	// FakeVMM runs VMs as processes without a guest and leaves the host's network alone: for tests.
	FakeVMM bool
	// FakeCommand is the program that such a VM is; empty: the running executable.
	FakeCommand []string
	// AfterStage, when set, is called after each stage of each of the engine's operations. Tests
	// kill the daemon there.
	AfterStage func(operation, stage string)
}

// Run is the daemon's whole life. It returns when ctx ends, with VMs still running, or when it
// cannot serve: a Conflict fault when another daemon serves the same state directory.
func Run(ctx context.Context, o Options) (err error) {
	syscall.Umask(0o077)
	debug.SetMemoryLimit(memoryLimit)
	if err := errors.Join(paths.CheckSocket(o.Paths.Socket()), o.Paths.Make()); err != nil {
		return err
	}
	config, err := loadConfig(o.Paths.ConfigFile())
	if err != nil {
		return err
	}
	held, err := takeLock(o.Paths)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, held.Release()) }()
	logger, closeLog := newLogger(o.Paths.DaemonLog(), config.logLevel)
	defer func() { err = errors.Join(err, closeLog()) }()

	logger.Info("daemon starts", "build", build.ID(), "pid", os.Getpid())
	err = o.live(ctx, config, logger)
	logger.Info("daemon ends", "error", err)
	return err
}

// live serves with all parts in place, and takes them down again.
func (o Options) live(ctx context.Context, config settings, logger *slog.Logger) (err error) {
	ctx, end := context.WithCancel(ctx)
	defer end()
	h, err := o.assemble(ctx, config, logger)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, h.close()) }()
	l, err := listen(o.Paths.Socket(), logger)
	if err != nil {
		return err
	}
	defer l.Close()
	tellManager(adopting, logger) // who connects from now on is answered, if late

	gate := server.NewGate()
	handler := server.New(server.Options{
		Engine: h.verbs(), Images: h.images, Kernels: h.kernels, Setup: h.setup, Builds: h.builder, Templates: h.engine, Snapshots: h.engine, Ports: h.ports,
		Paths: o.Paths, Defaults: config.defaults, Named: config.named, Logger: logger,
		Host: h.host, Shutdown: end, Gate: gate, Closing: ctx.Done(),
	})
	reconciled := make(chan struct{})
	go func() {
		defer close(reconciled)
		h.reconcile(ctx)
		if config.dns.IsValid() {
			h.names.listen(ctx, config.dns)
		}
		gate.Open()
		if ctx.Err() == nil {
			tellManager(serving, logger)
		}
	}()
	err = serve(ctx, l, handler, logger)
	end()
	<-reconciled // it ends with ctx
	return err
}

func takeLock(p paths.Paths) (*lock.Lock, error) {
	me, err := system.StartTime(os.Getpid())
	if err != nil {
		return nil, fault.Wrap(fault.Unexpected, err, "cannot read our own start time")
	}
	return lock.Acquire(p.Lock(), lock.Holder{PID: os.Getpid(), StartTime: me, Build: build.ID(), Since: time.Now()})
}

// newLogger logs to a file of bounded size.
func newLogger(path string, level slog.Level) (*slog.Logger, func() error) {
	w := &lumberjack.Logger{Filename: path, MaxSize: logMegabytes, MaxBackups: logBackups}
	return slog.New(slog.NewTextHandler(io.Writer(w), &slog.HandlerOptions{Level: level})), w.Close
}
