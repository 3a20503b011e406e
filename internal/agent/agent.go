// Package agent is banger's program in the guest. As the first process of the initramfs it is the init
// (package boot); then it serves the host on the guest channel. It imports nothing of the host's.
package agent

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	agentv1 "banger/api/agent/v1"
	"banger/api/agent/v1/agentv1connect"
	"banger/internal/agent/adopt"
	"banger/internal/agent/boot"
	"banger/internal/agent/cgroup"
	"banger/internal/agent/run"
	"banger/internal/agent/serve"
	"banger/internal/build"
	"banger/internal/channel"
)

const usage = "usage: banger-agent serve|adopt|supervise|start|guard PORT, sftp, or version"

// Main runs the agent with the arguments after the program's name and returns the exit code.
func Main(args []string, stdout, stderr io.Writer) int {
	if len(args) == 0 && os.Getpid() == 1 {
		boot.Run()
		return 1 // never reached
	}
	if err := dispatch(args, stdout); err != nil {
		fmt.Fprintf(stderr, "banger: agent: %v\n", err)
		return 1
	}
	return 0
}

func dispatch(args []string, stdout io.Writer) error {
	if len(args) == 1 && args[0] == "version" {
		_, err := fmt.Fprintln(stdout, build.ID())
		return err
	}
	if len(args) == 1 && args[0] == "sftp" {
		return serveSFTP()
	}
	if len(args) != 2 {
		return errors.New(usage)
	}
	switch args[0] {
	case "serve":
		return serveOn(args[1])
	case "adopt":
		return adoptAgent(args[1])
	case "supervise":
		return supervise(args[1])
	case "start":
		_, err := boot.EnsureAgent(args[1])
		return err
	case "guard":
		return guard(args[1], os.Stdin, os.NewFile(guardReady, "ready"))
	}
	return errors.New(usage)
}

// serveOn answers the host on the guest channel of that name until SIGTERM.
func serveOn(name string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, syscall.SIGINT)
	defer stop()
	// Caught and dropped: a signal that is ignored stays ignored in the programs that are started.
	signal.Notify(make(chan os.Signal, 1), syscall.SIGHUP)
	// It passes bytes on. Several threads that do so wait for each other, and in software emulation, where they take turns
	// on one of the host's, they do that by running idle: a quarter of the work.
	runtime.GOMAXPROCS(1)
	guest := newGuest()
	guest.StartGuard = func(ctx context.Context) (int, func(), error) { return startGuard(ctx, name) }
	guest.Later = serve.Later
	runner := run.Runner{Root: "/", Group: cgroup.Programs, Starting: guest.Starting()}
	handler := serve.New(serve.Options{
		Runner: runner, SetTime: adopt.SetTime, StepTime: adopt.StepTime,
		Quiesce: guest.Quiesce, Adopt: guest.Adopt, Ready: awaitInit, SSHListens: guest.SSHListens,
		// These need programs to run.
		Shutdown: func(ctx context.Context, mode agentv1.ShutdownRequest_Mode) error {
			guest.Want()
			return shutdown(ctx, mode)
		},
		Status: func(ctx context.Context) (*agentv1.StatusResponse, error) {
			guest.Want()
			return status(ctx)
		},
		Dial: func(ctx context.Context, port uint16) (serve.Conn, string, error) {
			guest.Want()
			return serve.DialLoopback(ctx, port)
		},
	})
	listen, err := listener(ctx, name, handler)
	if err != nil {
		return err
	}
	if err := boot.AwaitRelease(); err != nil {
		return err
	}
	if err := guest.TakeOver(); err != nil {
		fmt.Fprintf(os.Stderr, "banger: agent: let go what was held: %v\n", err) // the rest was, and the host is served
	}
	l, err := listen()
	if err != nil {
		return err
	}
	if firstProcess() == supervisor {
		haltOnSignal()
	}
	go serveSSH(ctx, runner) // ends with ctx, and so with us
	return serve.Serve(ctx, l, handler)
}

func newGuest() *adopt.Guest {
	return &adopt.Guest{
		Dir: boot.Dir, Disks: []string{boot.OverlayDir, "/root", "/"},
		Systemd: func() bool { return firstProcess() == systemd },
		Freeze: func(ctx context.Context, guard int, note func(string) error) (func() error, error) {
			return cgroup.Freeze(ctx, firstProcess() == systemd, guard, note)
		},
		Ready: awaitGroups, Thaw: cgroup.Thaw, Machine: adopt.Serials,
	}
}

// listener gets the guest channel of that name ready; what it returns begins to answer. On a vsock port each of the
// host's connections is a stream, a virtio-serial port carries them all.
func listener(ctx context.Context, name string, handler agentv1connect.AgentServiceHandler) (func() (net.Listener, error), error) {
	if number, ok := strings.CutPrefix(name, boot.VsockPrefix); ok {
		port, err := strconv.ParseUint(number, 10, 32)
		if err != nil {
			return nil, fmt.Errorf("%q is no vsock port", name)
		}
		return func() (net.Listener, error) { return listenVsock(uint32(port)) }, nil
	}
	port, err := openPort(ctx, name)
	if err != nil {
		return nil, err
	}
	return func() (net.Listener, error) { return channel.Listen(port, serve.Words(ctx, handler)), nil }, nil
}

const (
	portWait = 20 * time.Second
	portPoll = 5 * time.Millisecond
)

// openPort opens a virtio-serial port by its name. The links in /dev/virtio-ports are udev's work, and
// there may be none.
func openPort(ctx context.Context, name string) (*os.File, error) {
	ctx, cancel := context.WithTimeout(ctx, portWait)
	defer cancel()
	for {
		device, err := findPort("/sys/class/virtio-ports", name)
		if err != nil {
			return nil, err
		}
		if device != "" {
			port, err := os.OpenFile(filepath.Join("/dev", device), os.O_RDWR, 0)
			if !errors.Is(err, syscall.EBUSY) { // an agent that has just died had it open
				return port, err
			}
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("the virtio-serial port %s is not to be had within %v", name, portWait)
		case <-time.After(portPoll):
		}
	}
}

// findPort returns the device of the port, or "".
func findPort(class, name string) (string, error) {
	files, err := filepath.Glob(filepath.Join(class, "*", "name"))
	if err != nil {
		return "", err
	}
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err == nil && strings.TrimSpace(string(b)) == name {
			return filepath.Base(filepath.Dir(f)), nil
		}
	}
	return "", nil
}

const (
	initWait = 15 * time.Second
	initPoll = 10 * time.Millisecond
)

// awaitInit returns once the image's init takes orders. The agent answers before systemd is up; a
// program that was started then would find no manager to talk to. One that takes too long is not waited for.
func awaitInit(ctx context.Context) {
	if firstProcess() != systemd {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, initWait)
	defer cancel()
	for {
		if _, err := os.Stat("/run/systemd/private"); err == nil {
			return
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(initPoll):
		}
	}
}

// awaitGroups returns once the first process has made its control groups, when it is one that makes such.
func awaitGroups(ctx context.Context) error {
	if firstProcess() != systemd {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, initWait)
	defer cancel()
	for !cgroup.MadeByFirst() {
		select {
		case <-ctx.Done():
			return fmt.Errorf("systemd has not made its control groups: %w", ctx.Err())
		case <-time.After(initPoll):
		}
	}
	return nil
}

// adoptAgent makes the running agent a process of the systemd unit that calls this, or starts one in it.
func adoptAgent(port string) error {
	pid, err := boot.EnsureAgent(port)
	if err != nil {
		return err
	}
	return cgroup.Join(pid)
}

// restartPause is between an agent's end and the next one's start.
const restartPause = 200 * time.Millisecond

// supervise is the first process of an image without an init: it keeps the agent running, reaps whoever is left to
// it, and heeds the signals by which programs ask an init for the machine's end.
func supervise(port string) error {
	if err := boot.MountControlGroups(); err != nil {
		fmt.Fprintf(os.Stderr, "banger: supervise: %v\n", err) // what needs them says so itself
	}
	go obey()
	for {
		pid, err := boot.EnsureAgent(port)
		if err != nil {
			return err
		}
		for ended := 0; ended != pid; {
			ended, err = syscall.Wait4(-1, nil, 0, nil)
			if err != nil && !errors.Is(err, syscall.EINTR) {
				return fmt.Errorf("wait for the agent: %w", err)
			}
		}
		time.Sleep(restartPause)
	}
}

// obey ends the machine when BusyBox's halt, poweroff or reboot, or Ctrl-Alt-Del, ask for it (busybox/init/halt.c).
func obey() {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, syscall.SIGUSR1, syscall.SIGUSR2, syscall.SIGTERM, syscall.SIGINT, signalPowerOff, signalReboot)
	s := <-asked
	reboot := s == syscall.SIGTERM || s == syscall.SIGINT || s == signalReboot
	// The agent does it, so that the host hears how the programs it started end.
	signals := map[bool]syscall.Signal{false: agentPowerOff, true: agentReboot}
	if pid := boot.AgentPID(); pid != 0 && syscall.Kill(pid, signals[reboot]) == nil {
		time.Sleep(agentPatience)
	}
	halt(reboot)
}

// By these signals the first process has the agent end the machine, and for so long it waits for that.
const (
	agentPowerOff = syscall.SIGUSR2
	agentReboot   = syscall.SIGUSR1
	agentPatience = 2 * termGrace
)

// haltOnSignal ends the machine when the first process, which is one of ours, says so.
func haltOnSignal() {
	asked := make(chan os.Signal, 1)
	signal.Notify(asked, agentPowerOff, agentReboot)
	go func() { halt(<-asked == agentReboot) }()
}
