package helper

import (
	"context"
	"log/slog"
	"sync/atomic"
)

// maxLog is how many records one helper logs: some megabytes. A flood of requests is not to fill the disk.
const maxLog = 20_000

// boundedLog lets a number of records through, and then says once that there are no more.
type boundedLog struct {
	slog.Handler
	left *atomic.Int64
}

func newBoundedLog(h slog.Handler, most int64) boundedLog {
	left := new(atomic.Int64)
	left.Store(most)
	return boundedLog{h, left}
}

// Handle writes a record while there is room.
func (b boundedLog) Handle(ctx context.Context, r slog.Record) error {
	switch left := b.left.Add(-1); {
	case left == 0:
		return b.Handler.Handle(ctx, slog.NewRecord(r.Time, slog.LevelWarn, "the log is full: nothing more is written until the daemon starts anew", 0))
	case left < 0:
		return nil
	}
	return b.Handler.Handle(ctx, r)
}

// WithAttrs shares the bound.
func (b boundedLog) WithAttrs(attrs []slog.Attr) slog.Handler {
	return boundedLog{b.Handler.WithAttrs(attrs), b.left}
}

// WithGroup shares the bound.
func (b boundedLog) WithGroup(name string) slog.Handler {
	return boundedLog{b.Handler.WithGroup(name), b.left}
}
