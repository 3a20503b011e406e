package builder

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"banger/internal/fault"
	"banger/internal/progress"
)

const (
	logSuffix = ".log"
	maxLog    = 64 << 20 // bytes; what comes after is left out, and said
	keptLogs  = 20       // of builds before this one
	tailLines = 8        // of a script's output that go into an error
	maxLine   = 400      // bytes of a line in progress or an error
)

// buildLog is a build's own file. It also remembers the end of what the running script said.
type buildLog struct {
	path string

	mu      sync.Mutex
	file    *os.File
	written int64
	err     error
	partial string
	tail    []string
	onLine  func(string)
}

func newLog(path string) (*buildLog, error) {
	dir := filepath.Dir(path)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot make directory %s", dir)
	}
	forgetLogs(dir)
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "cannot write the log of the build")
	}
	return &buildLog{path: path, file: f}, nil
}

// forgetLogs removes all but the newest.
func forgetLogs(dir string) {
	found, _ := filepath.Glob(filepath.Join(dir, "*"+logSuffix))
	age := func(path string) time.Time {
		info, err := os.Stat(path)
		if err != nil {
			return time.Time{}
		}
		return info.ModTime()
	}
	slices.SortFunc(found, func(a, b string) int { return age(b).Compare(age(a)) })
	for _, path := range found[min(len(found), keptLogs):] {
		_ = os.Remove(path) // tried again next time
	}
}

// Write takes the output of what runs in the VM.
func (l *buildLog) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put(p)
	text := l.partial + string(p)
	lines := strings.Split(text, "\n")
	l.partial = lines[len(lines)-1]
	l.partial = l.partial[max(0, len(l.partial)-maxLine):]
	for _, line := range lines[:len(lines)-1] {
		if line = strings.TrimSpace(lastOf(line)); line == "" {
			continue
		}
		l.tail = append(l.tail, line)
		l.tail = l.tail[max(0, len(l.tail)-tailLines):]
		if l.onLine != nil {
			l.onLine(line)
		}
	}
	return len(p), nil
}

// lastOf returns what a terminal shows of a line that was written over and over, clipped.
func lastOf(line string) string {
	line = strings.TrimRight(line, "\r")
	line = line[strings.LastIndexByte(line, '\r')+1:]
	return strings.ToValidUTF8(line[:min(len(line), maxLine)], "?")
}

// put writes to the file; the caller holds mu. A log that cannot be written does not end the build.
func (l *buildLog) put(p []byte) {
	if l.err != nil || l.written > maxLog {
		return
	}
	_, l.err = l.file.Write(p)
	if l.written += int64(len(p)); l.written > maxLog {
		_, _ = l.file.WriteString("\n--- the log ends here: it is too long ---\n")
	}
}

// note writes a line of the builder's own.
func (l *buildLog) note(text string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.put([]byte("--- " + time.Now().UTC().Format(time.RFC3339) + " " + text + "\n"))
}

// begin forgets the end of the script before; onLine is told each line of the next one, and may be nil.
func (l *buildLog) begin(onLine func(string)) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tail, l.partial, l.onLine = nil, "", onLine
}

// end returns the last lines of the script.
func (l *buildLog) end() []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if last := strings.TrimSpace(lastOf(l.partial)); last != "" {
		return append(slices.Clone(l.tail), last)
	}
	return slices.Clone(l.tail)
}

// follow has the stages and notices of a build noted as well.
func (l *buildLog) follow(sink progress.Sink) progress.Sink {
	return func(e progress.Event) {
		if e.Status != progress.Update {
			l.note(strings.TrimSpace(e.Stage + " " + string(e.Status) + " " + e.Message))
		}
		sink.Send(e)
	}
}

// quiet notes the stages of the VM's creation without telling them: they are within one of the build's.
func (l *buildLog) quiet() progress.Sink { return l.follow(nil) }

// Close returns also why something could not be written before.
func (l *buildLog) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return errors.Join(l.err, l.file.Close())
}
