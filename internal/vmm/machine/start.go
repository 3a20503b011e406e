package machine

import (
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"al.essio.dev/pkg/shellescape"

	"banger/internal/fault"
	"banger/internal/system"
	"banger/internal/vmm"
)

// CheckFiles finds files of a machine that are not there.
func CheckFiles(m vmm.Machine) error {
	if info, err := os.Stat(m.Dir); err != nil || !info.IsDir() || !filepath.IsAbs(m.Dir) {
		return fault.New(fault.Precondition, "the machine's directory %q is not there", m.Dir)
	}
	files := map[string]string{"kernel": m.Kernel, "initramfs": m.Initramfs}
	for _, d := range m.Disks {
		files[d.Role+" disk"] = d.Path
	}
	for what, path := range files {
		if path == "" {
			continue
		}
		if err := checkFile(m.Dir, path); err != nil {
			return fault.Wrap(fault.Precondition, err, "the %s of %s cannot be used", what, m.Name)
		}
	}
	return nil
}

func checkFile(dir, path string) error {
	path = Absolute(dir, path)
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() || info.Size() == 0 {
		return fmt.Errorf("%s is empty or no regular file", path)
	}
	return nil
}

// CheckHost finds what of the machine this host lacks.
func CheckHost(m vmm.Machine) error {
	if err := CheckFiles(m); err != nil {
		return err
	}
	for _, n := range m.NICs {
		// A VMM with the right to do so would make a missing one, connected to nothing.
		if _, err := net.InterfaceByName(n.TAP); err != nil {
			return fault.Wrap(fault.Precondition, err, "the network device %s of %s cannot be used", n.TAP, m.Name)
		}
	}
	return nil
}

// WriteCommand writes the command line into the machine's directory as a script for a shell.
func WriteCommand(dir string, argv []string) error {
	var b strings.Builder
	fmt.Fprintf(&b, "cd %s && exec", shellescape.Quote(dir))
	for i, a := range argv {
		if i == 0 || strings.HasPrefix(a, "-") {
			b.WriteString(" \\\n ")
		}
		b.WriteString(" " + shellescape.Quote(a))
	}
	b.WriteString("\n")
	if err := os.WriteFile(filepath.Join(dir, vmm.CommandFile), []byte(b.String()), 0o600); err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write the command line")
	}
	return nil
}

// Kill ends a process whose start failed, and waits for its end.
func Kill(p *system.Process) {
	_ = p.Signal(syscall.SIGKILL) // it may have ended
	select {
	case <-p.Done():
	case <-time.After(killGrace):
	}
	_ = p.Close()
}

// RemoveIfUnlocked removes what a dead machine left in dir, unless a process lives there.
func RemoveIfUnlocked(dir string, names []string) {
	lock, err := Lock(dir)
	if err != nil {
		return
	}
	defer lock.Close()
	RemoveSockets(dir, names)
}

// ClassifyStatus classes the end of a VMM of which nothing else is known.
func ClassifyStatus(s system.ExitStatus, stopped bool) vmm.Exit {
	kind := vmm.ExitCrash
	switch {
	case stopped:
		kind = vmm.ExitStopped
	case s.Signal == syscall.SIGSEGV || s.Signal == syscall.SIGABRT || s.Signal == syscall.SIGBUS ||
		s.Signal == syscall.SIGILL || s.Signal == syscall.SIGFPE || s.Signal == syscall.SIGSYS:
	case s.Signal != 0 || !s.Known || s.Code == 0:
		// A VMM that ended in good order without the guest's wish was told to by someone; and of one
		// that is no child of ours and left no word a signal is the likeliest end.
		kind = vmm.ExitKilled
	}
	return vmm.Exit{Kind: kind, Detail: s.String()}
}

// PrepareLogs is PrepareLog, and writes down the command line.
func PrepareLogs(dir string, argv []string) error {
	if err := PrepareLog(dir); err != nil {
		return err
	}
	return WriteCommand(dir, argv)
}

// PrepareLog puts the last serial log aside. The new one is ours alone to read: a console may show secrets.
func PrepareLog(dir string) error {
	log := filepath.Join(dir, vmm.SerialLog)
	if err := os.Rename(log, log+".1"); err != nil && !os.IsNotExist(err) {
		return fault.Wrap(fault.Precondition, err, "cannot put the old serial log aside")
	}
	f, err := os.OpenFile(log, os.O_CREATE|os.O_WRONLY, 0o600)
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot make the serial log")
	}
	return nil
}

// Ended tells whether a process whose sockets fail ends as well, within a moment.
func Ended(p *system.Process, within time.Duration) bool {
	t := time.NewTimer(within)
	defer t.Stop()
	select {
	case <-p.Done():
		return true
	case <-t.C:
		return false
	}
}
