package cli

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"banger/internal/fault"
)

type daemonLogsOptions struct {
	follow bool
	lines  int32
}

func newDaemonLogsCommand(e *Env) *cobra.Command {
	var o daemonLogsOptions
	cmd := &cobra.Command{
		Use: "logs", Short: "Show the daemon's log, also when it does not run",
		Args: noArguments, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: func(cmd *cobra.Command, _ []string) error { return runDaemonLogs(cmd.Context(), o, e) },
	}
	addLogFlags(cmd, &o.follow, &o.lines)
	return cmd
}

// followPause is how often a followed file is looked at.
const followPause = 250 * time.Millisecond

func runDaemonLogs(ctx context.Context, o daemonLogsOptions, e *Env) error {
	if err := checkLines(o.lines); err != nil {
		return err
	}
	path := e.Paths.DaemonLog()
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return fault.New(fault.NotFound, "there is no daemon log at %s", path).
			WithHint("the daemon writes one when it starts: banger daemon start")
	}
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot read the daemon's log")
	}
	defer func() { _ = f.Close() }()
	if err := seekLines(f, int(o.lines)); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot read the daemon's log")
	}
	if _, err := io.Copy(e.Stdout, f); err != nil || !o.follow {
		return err
	}
	if e.timeout == 0 {
		return explain(ctx, followFile(ctx, e.Stdout, &f, path))
	}
	return e.within(ctx, e.timeout, func(ctx context.Context) error { return followFile(ctx, e.Stdout, &f, path) })
}

// followFile copies what is added to *f until ctx ends. When path has become another file, or a
// shorter one, it goes on at that one's beginning: logs rotate.
func followFile(ctx context.Context, to io.Writer, f **os.File, path string) error {
	tick := time.NewTicker(followPause)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		if _, err := io.Copy(to, *f); err != nil {
			return err
		}
		if !replaced(*f, path) {
			continue
		}
		next, err := os.Open(path)
		if err != nil {
			continue // just being renamed: the next look finds it
		}
		_ = (*f).Close()
		*f = next
	}
}

func replaced(f *os.File, path string) bool {
	now, err := os.Stat(path)
	if err != nil {
		return false
	}
	ours, err := f.Stat()
	if err != nil {
		return true
	}
	at, err := f.Seek(0, io.SeekCurrent)
	return err != nil || !os.SameFile(now, ours) || now.Size() < at
}

// seekLines moves f so that its last n lines follow; 0 means all.
func seekLines(f *os.File, n int) error {
	if n == 0 {
		return nil
	}
	end, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	const chunk = 32 << 10
	buffer := make([]byte, chunk)
	for at := end; at > 0; {
		from := max(0, at-chunk)
		part := buffer[:at-from]
		if _, err := f.ReadAt(part, from); err != nil {
			return err
		}
		if at == end {
			part = bytes.TrimSuffix(part, []byte("\n")) // the last line's own end counts for none
		}
		for i := len(part) - 1; i >= 0; i-- {
			if part[i] != '\n' {
				continue
			}
			if n--; n == 0 {
				_, err := f.Seek(from+int64(i)+1, io.SeekStart)
				return err
			}
		}
		at = from
	}
	_, err = f.Seek(0, io.SeekStart)
	return err
}
