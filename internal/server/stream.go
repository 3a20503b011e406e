package server

import (
	"context"
	"log/slog"

	"banger/internal/progress"
)

// eventBuffer holds progress that the client has not read yet. When it is full, progress is
// dropped: it never holds up the work it tells of.
const eventBuffer = 256

// withProgress runs work and sends its progress. When a send fails the client has gone, and work's context is
// cancelled; withProgress returns when work has, rollback included.
func withProgress(ctx context.Context, logger *slog.Logger, send func(progress.Event) error,
	work func(context.Context, progress.Sink) error,
) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	events := make(chan progress.Event, eventBuffer)
	sink := func(e progress.Event) {
		select {
		case events <- e:
		default:
		}
	}
	result := make(chan error, 1)
	go func() { result <- guarded(logger, "work", func() error { return work(ctx, sink) }) }()

	deliver := func(e progress.Event) {
		if send == nil {
			return
		}
		if send(e) != nil {
			send = nil
			cancel()
		}
	}
	for {
		select {
		case e := <-events:
			deliver(e)
		case err := <-result:
			for { // what was told before the end
				select {
				case e := <-events:
					deliver(e)
				default:
					return err
				}
			}
		}
	}
}
