package daemon

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// Limits of the server's life.
const (
	headerTimeout = 10 * time.Second
	idleTimeout   = 5 * time.Minute
	drainTimeout  = 5 * time.Second        // for calls under way when the daemon ends
	flushTimeout  = 100 * time.Millisecond // for the last answers to be sent
	socketCheck   = 10 * time.Second
)

// serve answers on the socket until ctx ends, then lets calls under way finish for drainTimeout. When the socket's file
// vanishes (a cleaner of temporary directories), it binds a new one.
func serve(ctx context.Context, l *listener, h http.Handler, logger *slog.Logger) error {
	// Calls outlive ctx, by drainTimeout at the most.
	calls, cancelCalls := context.WithCancel(context.WithoutCancel(ctx))
	defer cancelCalls()
	var running inFlight
	srv := &http.Server{
		Handler: running.count(h), ReadHeaderTimeout: headerTimeout, IdleTimeout: idleTimeout, MaxHeaderBytes: 64 << 10,
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
			tellManager(stopping, logger)
			_ = l.Close() // removes the socket: new clients find no daemon and start another
			running.wait(drainTimeout)
			cancelCalls()
			return flush(srv)
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

// flush ends the server once its last answers are sent. HTTP/2 connections that idle clients hold open would
// keep an orderly shutdown waiting for a second.
func flush(srv *http.Server) error {
	ctx, cancel := context.WithTimeout(context.Background(), flushTimeout)
	defer cancel()
	err := srv.Shutdown(ctx)
	if errors.Is(err, context.DeadlineExceeded) {
		return srv.Close()
	}
	return err
}

// inFlight counts the calls under way.
type inFlight struct {
	mu    sync.Mutex
	calls int
	idle  chan struct{} // when set, closed as soon as there are none
}

func (f *inFlight) count(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.add(1)
		defer f.add(-1)
		next.ServeHTTP(w, r)
	})
}

func (f *inFlight) add(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.calls += n
	if f.calls == 0 && f.idle != nil {
		close(f.idle)
		f.idle = nil
	}
}

// wait returns when no call is under way, at the latest after limit.
func (f *inFlight) wait(limit time.Duration) {
	f.mu.Lock()
	if f.calls == 0 {
		f.mu.Unlock()
		return
	}
	idle := make(chan struct{})
	f.idle = idle
	f.mu.Unlock()
	select {
	case <-idle:
	case <-time.After(limit):
	}
}
