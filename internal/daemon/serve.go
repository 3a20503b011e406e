package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"time"
)

// Limits of the server's life.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 5 * time.Minute
	drainTimeout  = 5 * time.Second // for calls under way when the daemon ends
	socketCheck   = 10 * time.Second
)

// serve answers on the socket until ctx ends, then lets calls under way finish for drainTimeout. When the socket's file
// vanishes (a cleaner of temporary directories), it binds a new one.
func serve(ctx context.Context, l *listener, h http.Handler, logger *slog.Logger) error {
	// Calls outlive ctx, by drainTimeout at the most.
	calls, cancelCalls := context.WithCancel(context.WithoutCancel(ctx))
	defer cancelCalls()
	srv := &http.Server{
		Handler: h, ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: 64 << 10,
		BaseContext: func(net.Listener) context.Context { return calls },
		Protocols:   new(http.Protocols),
		ErrorLog:    slog.NewLogLogger(logger.Handler(), slog.LevelDebug), // clients that send nonsense
	}
	srv.Protocols.SetHTTP1(true)
	srv.Protocols.SetUnencryptedHTTP2(true)
	broken := make(chan error, 1)
	run := func(l *listener) {
		if err := srv.Serve(l); !errors.Is(err, http.ErrServerClosed) && !errors.Is(err, net.ErrClosed) {
			select {
			case broken <- err:
			default:
			}
		}
	}
	go run(l)

	ticker := time.NewTicker(socketCheck)
	defer ticker.Stop()
	for {
		select {
		case err := <-broken:
			_ = srv.Close()
			return err
		case <-ticker.C:
			l = rebind(l, run, logger)
		case <-ctx.Done():
			return drain(srv, cancelCalls)
		}
	}
}

// rebind replaces a listener whose file is gone.
func rebind(l *listener, run func(*listener), logger *slog.Logger) *listener {
	if l.present() {
		return l
	}
	fresh, err := listen(l.path, logger)
	if err != nil {
		logger.Error("the socket vanished and cannot be bound again", "error", err)
		return l
	}
	logger.Warn("the socket vanished; bound again", "path", l.path)
	_ = l.Close() // nobody can reach it any more
	go run(fresh)
	return fresh
}

// drain stops accepting, waits for calls under way, and cancels those that last.
func drain(srv *http.Server, cancelCalls func()) error {
	ctx, cancel := context.WithTimeout(context.Background(), drainTimeout)
	defer cancel()
	err := srv.Shutdown(ctx)
	cancelCalls()
	if errors.Is(err, context.DeadlineExceeded) {
		return srv.Close()
	}
	return err
}
