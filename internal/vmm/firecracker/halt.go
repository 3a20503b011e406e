package firecracker

import (
	"errors"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"banger/internal/vmm"
	"banger/internal/vmm/machine"
)

// Firecracker's x86 machines cannot be switched off from within: a guest that powers off says so on its console and
// then stands still for ever, while the process lives. So the console is watched for that line.
const (
	haltSettle = 100 * time.Millisecond // after something was written, until it is looked at
	haltQuiet  = 200 * time.Millisecond // in which a machine that stands still writes nothing more
	haltPoll   = time.Second            // where the host has no inotify left for us
)

// haltWatch watches one machine's console.
type haltWatch struct {
	path    string
	events  *os.File // of inotify(7); nil: the console is polled
	done    chan struct{}
	ended   sync.WaitGroup
	closing sync.Once
}

// watchHalt calls halted once, with the line, when the guest of the machine in dir stands still for good.
func watchHalt(dir string, halted func(line string)) *haltWatch {
	w := &haltWatch{path: filepath.Join(dir, vmm.SerialLog), done: make(chan struct{})}
	w.events = notify(w.path)
	w.ended.Go(func() { w.run(halted) })
	return w
}

// notify returns a file that can be read when path is written to, or nil.
func notify(path string) *os.File {
	fd, err := unix.InotifyInit1(unix.IN_NONBLOCK | unix.IN_CLOEXEC)
	if err != nil {
		return nil
	}
	f := os.NewFile(uintptr(fd), "inotify")
	if _, err := unix.InotifyAddWatch(fd, path, unix.IN_MODIFY); err != nil {
		_ = f.Close()
		return nil
	}
	return f
}

func (w *haltWatch) run(halted func(string)) {
	for {
		if !w.pause(haltSettle) {
			return
		}
		if line, ok := w.look(); ok {
			halted(line)
			return
		}
		if !w.wait() {
			return
		}
	}
}

// look tells whether the console's last word is that of a machine which stands still, and stays so.
func (w *haltWatch) look() (string, bool) {
	if _, ok := machine.Halted(machine.Tail(w.path, 1)); !ok {
		return "", false
	}
	before, err := os.Stat(w.path)
	if err != nil || !w.pause(haltQuiet) {
		return "", false
	}
	line, ok := machine.Halted(machine.Tail(w.path, 1))
	after, err := os.Stat(w.path)
	return line, ok && err == nil && after.Size() == before.Size()
}

// wait returns when the console may have changed; false when the watch has ended.
func (w *haltWatch) wait() bool {
	if w.events == nil {
		return w.pause(haltPoll)
	}
	_, err := w.events.Read(make([]byte, 4<<10))
	if errors.Is(err, os.ErrClosed) {
		return false
	}
	return err == nil || w.pause(haltPoll)
}

func (w *haltWatch) pause(d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-w.done:
		return false
	}
}

// close ends the watch.
func (w *haltWatch) close() {
	w.closing.Do(func() {
		close(w.done)
		if w.events != nil {
			_ = w.events.Close() // ends the read
		}
	})
	w.ended.Wait()
}
