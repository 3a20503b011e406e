package server

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"connectrpc.com/connect"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/fault"
	"banger/internal/vm"
	"banger/internal/vmm"
)

const (
	logChunk = 32 << 10
	logPoll  = 250 * time.Millisecond // only while somebody follows
)

// ReadLog sends a log of a VM and, with follow, what is added to it until the client goes or the
// VM is deleted. A log that is rotated or emptied meanwhile is read on from its new beginning.
func (s vmService) ReadLog(ctx context.Context, req *bangerv1.ReadLogRequest, out *connect.ServerStream[bangerv1.ReadLogResponse]) error {
	v, err := s.get(ctx, req.GetVm())
	if err != nil {
		return err
	}
	if req.GetTailLines() < 0 {
		return fault.New(fault.Usage, "cannot show %d lines", req.GetTailLines())
	}
	path, err := s.logPath(v, req.GetSource())
	if err != nil {
		return err
	}
	send := func(b []byte) error { return out.Send(&bangerv1.ReadLogResponse{Data: b}) }
	l := &logReader{path: path, send: send}
	defer l.close()
	err = l.open(int(req.GetTailLines()))
	switch {
	case errors.Is(err, fs.ErrNotExist) && req.GetFollow(): // it will be there when the VM starts
	case errors.Is(err, fs.ErrNotExist):
		return fault.New(fault.NotFound, "VM %s has no such log yet", v.Spec.Name).
			WithHint("it is written when the VM starts: banger vm start %s", v.Spec.Name)
	case err != nil:
		return fault.Wrap(fault.Unexpected, err, "cannot read %s", path)
	}
	if !req.GetFollow() {
		return l.copy(l.size())
	}
	if err := send(nil); err != nil { // the answer's headers: the client's call returns, also when there is nothing to read yet
		return err
	}
	return l.follow(ctx)
}

func (s *service) logPath(v vm.VM, source bangerv1.ReadLogRequest_Source) (string, error) {
	switch source {
	case bangerv1.ReadLogRequest_SOURCE_UNSPECIFIED, bangerv1.ReadLogRequest_SOURCE_SERIAL:
		return filepath.Join(s.Paths.VM(v.ID), vmm.SerialLog), nil
	case bangerv1.ReadLogRequest_SOURCE_VMM:
		return filepath.Join(s.Paths.VM(v.ID), vmm.VMMLog), nil
	}
	return "", fault.New(fault.Usage, "unknown log %d", source)
}

// logReader reads a file that grows, and may be replaced or emptied.
type logReader struct {
	path   string
	send   func([]byte) error
	file   *os.File // nil while there is none
	offset int64
}

func (l *logReader) close() {
	if l.file != nil {
		_ = l.file.Close()
		l.file = nil
	}
}

// open opens the file and goes to the last lines of it; lines 0 means the beginning.
func (l *logReader) open(lines int) error {
	f, err := os.Open(l.path)
	if err != nil {
		return err
	}
	l.close()
	l.file, l.offset = f, 0
	if lines > 0 {
		l.offset, err = tailOffset(f, l.size(), lines)
	}
	return err
}

func (l *logReader) size() int64 {
	if l.file == nil {
		return 0
	}
	info, err := l.file.Stat()
	if err != nil {
		return 0
	}
	return info.Size()
}

// copy sends what lies before end.
func (l *logReader) copy(end int64) error {
	for l.offset < end {
		chunk := make([]byte, min(logChunk, end-l.offset))
		n, err := l.file.ReadAt(chunk, l.offset)
		l.offset += int64(n)
		if n > 0 {
			if err := l.send(chunk[:n]); err != nil {
				return err
			}
		}
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fault.Wrap(fault.Unexpected, err, "cannot read %s", l.path)
		}
	}
	return nil
}

// follow sends what is there and what comes, until ctx ends or the VM's directory is gone.
func (l *logReader) follow(ctx context.Context) error {
	for {
		if err := l.copy(l.size()); err != nil {
			return err
		}
		replaced, err := l.replaced()
		if err != nil {
			return err
		}
		if replaced {
			if err := l.copy(l.size()); err != nil { // what came before it was replaced
				return err
			}
			if err := l.open(0); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fault.Wrap(fault.Unexpected, err, "cannot read %s", l.path)
			}
			continue
		}
		if _, err := os.Stat(filepath.Dir(l.path)); errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err := pause(ctx, logPoll); err != nil {
			return err
		}
	}
}

// replaced tells whether the path names another file now, and goes back to the beginning of one
// that was emptied.
func (l *logReader) replaced() (bool, error) {
	now, err := os.Stat(l.path)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fault.Wrap(fault.Unexpected, err, "cannot read %s", l.path)
	}
	if l.file == nil {
		return true, nil
	}
	open, err := l.file.Stat()
	if err != nil {
		return false, fault.Wrap(fault.Unexpected, err, "cannot read %s", l.path)
	}
	if !os.SameFile(now, open) {
		return true, nil
	}
	if now.Size() < l.offset {
		l.offset = 0
	}
	return false, nil
}

// tailOffset returns where the last lines of a file of this size begin.
func tailOffset(f io.ReaderAt, size int64, lines int) (int64, error) {
	block := make([]byte, logChunk)
	for end, found := size, 0; end > 0; {
		begin := max(0, end-logChunk)
		part := block[:end-begin]
		if _, err := f.ReadAt(part, begin); err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		for i := bytes.LastIndexByte(part, '\n'); i >= 0; i = bytes.LastIndexByte(part[:i], '\n') {
			if begin+int64(i) == size-1 {
				continue // ends the last line
			}
			if found++; found == lines {
				return begin + int64(i) + 1, nil
			}
		}
		end = begin
	}
	return 0, nil
}
