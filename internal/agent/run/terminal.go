package run

import (
	"os"

	"golang.org/x/sys/unix"

	"banger/internal/agent/serve"
)

// openTerminal makes a pseudo-terminal. The master stays in non-blocking mode, so that reads have deadlines.
func openTerminal(size serve.Size) (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, err
	}
	err = control(master, func(fd int) error {
		if err := unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0); err != nil {
			return os.NewSyscallError("unlock the terminal", err)
		}
		// The peer is opened by descriptor: no path, so it does not matter where devpts is mounted.
		peer, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.TIOCGPTPEER, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC)
		if errno != 0 {
			return os.NewSyscallError("open the terminal's peer", errno)
		}
		slave = os.NewFile(peer, "terminal")
		return nil
	})
	if err == nil {
		err = resize(master, size)
	}
	if err != nil {
		master.Close()
		if slave != nil {
			slave.Close()
		}
		return nil, nil, err
	}
	return master, slave, nil
}

func resize(master *os.File, to serve.Size) error {
	return control(master, func(fd int) error {
		return unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: to.Rows, Col: to.Columns})
	})
}

// control calls f with the descriptor of file, without the change to blocking mode that File.Fd makes.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var inner error
	if err := raw.Control(func(fd uintptr) { inner = f(int(fd)) }); err != nil {
		return err
	}
	return inner
}
