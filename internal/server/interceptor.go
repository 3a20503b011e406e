package server

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"strings"
	"time"

	"connectrpc.com/connect"

	"banger/api/banger/v1/bangerv1connect"
	"banger/internal/fault"
	"banger/internal/wire/wirefault"
)

// interceptor stands around every call: it waits until the engine is ready, catches panics, notes
// the call in the log and sends faults as such.
type interceptor struct {
	logger  *slog.Logger
	gate    *Gate
	closing <-chan struct{}
}

// around runs one call.
func (i *interceptor) around(ctx context.Context, procedure string, call func() error) error {
	begin := time.Now()
	err := i.awaitReady(ctx, procedure)
	if err == nil {
		err = guarded(i.logger, procedure, call)
	}
	level := slog.LevelDebug
	if err != nil && fault.KindOf(err) == fault.Unexpected {
		level = slog.LevelError
	}
	i.logger.LogAttrs(ctx, level, "call", slog.String("procedure", procedure),
		slog.Duration("duration", time.Since(begin)), slog.Any("error", err))
	return wirefault.ToConnect(err)
}

// awaitReady lets calls about the daemon itself through at all times.
func (i *interceptor) awaitReady(ctx context.Context, procedure string) error {
	if strings.HasPrefix(procedure, "/"+bangerv1connect.DaemonServiceName+"/") {
		return nil
	}
	return i.gate.wait(ctx)
}

// guarded runs f and makes a fault of a panic, so that one call's bug does not end the daemon.
func guarded(logger *slog.Logger, what string, f func() error) (err error) {
	defer func() {
		p := recover()
		if p == nil {
			return
		}
		if p == http.ErrAbortHandler { // how net/http is told to drop a connection
			panic(p)
		}
		logger.Error("panic", "in", what, "value", fmt.Sprint(p), "stack", string(debug.Stack()))
		err = fault.New(fault.Unexpected, "panic in %s: %v", what, p).
			WithHint("this is a bug in banger; banger daemon logs has the trace")
	}()
	return f()
}

// WrapUnary is part of connect.Interceptor.
func (i *interceptor) WrapUnary(next connect.UnaryFunc) connect.UnaryFunc {
	return func(ctx context.Context, req connect.AnyRequest) (res connect.AnyResponse, err error) {
		err = i.around(ctx, req.Spec().Procedure, func() error {
			res, err = next(ctx, req)
			return err
		})
		if err != nil {
			return nil, err
		}
		return res, nil
	}
}

// WrapStreamingHandler is part of connect.Interceptor. Streams may last, so they end when the daemon does.
func (i *interceptor) WrapStreamingHandler(next connect.StreamingHandlerFunc) connect.StreamingHandlerFunc {
	return func(ctx context.Context, conn connect.StreamingHandlerConn) error {
		ctx, cancel := context.WithCancel(ctx)
		defer cancel()
		go func() {
			select {
			case <-i.closing:
				cancel()
			case <-ctx.Done():
			}
		}()
		return i.around(ctx, conn.Spec().Procedure, func() error { return next(ctx, conn) })
	}
}

// WrapStreamingClient is part of connect.Interceptor.
func (i *interceptor) WrapStreamingClient(next connect.StreamingClientFunc) connect.StreamingClientFunc {
	return next
}
