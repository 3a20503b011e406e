package machine

import (
	"io"
	"os"
	"strings"

	"banger/internal/fault"
)

// Tail returns the last lines of a log, oldest first: at most n, from at most the last 64 KiB. A log
// that cannot be read has none. A guest writes what it likes there: control characters, which would play
// tricks on the terminal of whoever reads the line as a reason, are made question marks.
func Tail(path string, n int) []string {
	const most = 64 << 10
	f, err := os.Open(path)
	if err != nil {
		return nil
	}
	defer f.Close()
	size, err := f.Seek(0, io.SeekEnd)
	if err != nil {
		return nil
	}
	if _, err := f.Seek(max(0, size-most), io.SeekStart); err != nil {
		return nil
	}
	text, err := io.ReadAll(io.LimitReader(f, most))
	if err != nil {
		return nil
	}
	var lines []string
	for line := range strings.Lines(strings.TrimLeft(string(text), "\x00")) {
		if line = strings.TrimRight(line, "\r\n"); line != "" {
			lines = append(lines, fault.Printable(line))
		}
	}
	return lines[max(0, len(lines)-n):]
}
