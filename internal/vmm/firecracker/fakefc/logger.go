package fakefc

import (
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// logger writes lines of the form "<local time> [<id>:<thread>] text". It begins with stdout.
type logger struct {
	mu  sync.Mutex
	id  string
	out io.Writer
	off bool
}

func (l *logger) printf(thread, format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.off {
		return
	}
	fmt.Fprintf(l.out, "%s [%s:%s] %s\n", time.Now().Format("2006-01-02T15:04:05.000000000"), l.id, thread,
		strings.ReplaceAll(fmt.Sprintf(format, args...), "\n", " "))
}

// openSink opens a file or FIFO for a log. Before 1.14 it is not made when it is missing.
func openSink(v version, path string) (*os.File, error) {
	mode := os.O_RDWR | os.O_APPEND
	if v.atLeast(version{1, 14, 0}) {
		mode |= os.O_CREATE
	}
	return os.OpenFile(path, mode, 0o644)
}

// set configures the log. What is not named goes back to its default, but for the file.
func (l *logger) set(v version, c loggerConfig) error {
	off := false
	if c.Level != nil {
		level := strings.ToLower(*c.Level)
		if !slices.Contains([]string{"off", "trace", "debug", "info", "warn", "warning", "error"}, level) {
			return fail("An error occurred when deserializing the json body of a request: Invalid LevelFilter.")
		}
		off = level == "off" || level == "error" || strings.HasPrefix(level, "warn")
	}
	var out io.Writer
	if c.Path != nil {
		f, err := openSink(v, *c.Path)
		if err != nil {
			return fail("Logger error: Failed to open target file: %s", osError(err))
		}
		out = f
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.off = off
	if out != nil {
		l.out = out
	}
	return nil
}

// metrics are written to one file, an object a line.
type metrics struct {
	mu  sync.Mutex
	out io.Writer
}

var errMetricsSet = fail("Metrics error: Cannot initialize the metrics system due to bad user input: Reinitialization of metrics not allowed.")

func (t *metrics) set(v version, path string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.out != nil {
		return errMetricsSet
	}
	f, err := openSink(v, path)
	if err != nil {
		return fail("Metrics error: Cannot initialize the metrics system due to bad user input: %s", osError(err))
	}
	t.out = f
	return nil
}

// flush writes a line, if there is a file.
func (t *metrics) flush() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.out == nil {
		return
	}
	_ = json.NewEncoder(t.out).Encode(map[string]any{ // a full disk costs lines, not machines
		"utc_timestamp_ms": time.Now().UnixMilli(),
		"api_server":       map[string]int{"process_startup_time_us": 1000, "process_startup_time_cpu_us": 1000},
		"latencies_us":     map[string]int{}, "vmm": map[string]int{"panic_count": 0},
		"seccomp": map[string]int{"num_faults": 0}, "signals": map[string]int{}, "uart": map[string]int{"error_count": 0},
	})
}
