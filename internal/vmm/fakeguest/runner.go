package fakeguest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"banger/internal/agent/serve"
)

// rootDir holds the guest's files, below the machine's directory: what a guest wrote is there after
// its next start.
const rootDir = "fake-root"

// Runner plays the programs of a guest.
type Runner struct{ Memory *Memory }

var _ serve.Runner = Runner{}

// call is one program that runs.
type call struct {
	ctx    context.Context
	memory *Memory // of the machine
	p      serve.Program
	args   []string
	end    syscall.Signal // the signal that ended it
}

var programs map[string]func(*call) int

func init() {
	programs = map[string]func(*call) int{
		"true": func(*call) int { return 0 }, "false": func(*call) int { return 1 },
		"echo": echo, "cat": cat, "env": env, "exit": exit, "hostname": hostname, "sleep": sleep,
		"sync": func(*call) int { return 0 }, "touch": touch, "write": write, "rm": remove, "sh": shell,
		"modprobe": modprobe, "warn": warn, "count": count, "chatter": chatter, "identity": identity,
	}
}

// Run plays a program, or answers 127 for one there is none of. Without an argv it is a shell that
// takes its commands from stdin.
func (r Runner) Run(ctx context.Context, p serve.Program) serve.Exit {
	argv := p.Argv
	if len(argv) == 0 {
		argv = []string{"sh"}
	}
	if _, ok := programs[argv[0]]; !ok {
		return serve.Exit{Code: 127, Error: argv[0] + ": no such program in the fake guest"}
	}
	p.Started(1000)
	c := &call{ctx: ctx, memory: r.Memory, p: p}
	code := c.play(argv)
	return serve.Exit{Code: code, Signal: c.end}
}

func (c *call) play(argv []string) int {
	f, ok := programs[argv[0]]
	if !ok {
		return c.fail(127, errors.New(argv[0]+": not found"))
	}
	saved := c.args
	defer func() { c.args = saved }()
	c.args = argv[1:]
	return f(c)
}

func (c *call) fail(code int, err error) int {
	out := c.p.Stderr
	if c.p.Terminal != nil {
		out = c.p.Stdout
	}
	fmt.Fprintln(out, err)
	return code
}

func (c *call) print(text string) int {
	if _, err := io.WriteString(c.p.Stdout, text); err != nil {
		return 1
	}
	return 0
}

// path keeps files below rootDir, whatever name is given.
func path(name string) string { return filepath.Join(rootDir, filepath.Join("/", name)) }

func echo(c *call) int { return c.print(strings.Join(c.args, " ") + "\n") }

func warn(c *call) int { return c.fail(0, errors.New(strings.Join(c.args, " "))) }

func hostname(c *call) int { return c.print(c.memory.Name() + "\n") }

// modprobe knows the modules that capabilities load.
func modprobe(c *call) int {
	if len(c.args) == 1 && c.args[0] == "virtio_balloon" {
		return 0
	}
	return c.fail(1, fmt.Errorf("modprobe: FATAL: Module %s not found", strings.Join(c.args, " ")))
}

// count says how often it was called since the boot.
func count(c *call) int { return c.print(strconv.Itoa(c.memory.count()) + "\n") }

// chatter talks until nobody listens.
func chatter(c *call) int {
	for c.ctx.Err() == nil {
		if c.print("chatter chatter chatter\n") != 0 {
			return 1
		}
		time.Sleep(time.Millisecond)
	}
	return 1
}

// identity shows the identity that the guest was given last, as JSON of a GuestConfig.
func identity(c *call) int {
	text := c.memory.identity()
	if text == "" {
		return c.fail(1, errors.New("identity: it is what it was booted as"))
	}
	return c.print(text + "\n")
}

func env(c *call) int {
	vars := append([]string{"HOME=/root", "PATH=/usr/bin", "USER=root"}, c.p.Env...)
	return c.print(strings.Join(vars, "\n") + "\n")
}

func exit(c *call) int {
	if len(c.args) == 0 {
		return 0
	}
	code, err := strconv.Atoi(c.args[0])
	if err != nil {
		return c.fail(2, err)
	}
	return code & 0xff
}

func cat(c *call) int {
	if len(c.args) == 0 {
		if c.p.Stdin == nil {
			return 0
		}
		if _, err := io.Copy(c.p.Stdout, c.p.Stdin); err != nil {
			return c.fail(1, err)
		}
		return 0
	}
	for _, name := range c.args {
		text, err := os.ReadFile(path(name))
		if err != nil {
			return c.fail(1, fmt.Errorf("%s: no such file", name))
		}
		if c.print(string(text)) != 0 {
			return 1
		}
	}
	return 0
}

func touch(c *call) int {
	for _, name := range c.args {
		if err := put(name, "", os.O_APPEND); err != nil {
			return c.fail(1, err)
		}
	}
	return 0
}

// write FILE WORD...: the words and a newline become the file's text.
func write(c *call) int {
	if len(c.args) < 1 {
		return c.fail(2, errors.New("write: no file named"))
	}
	if err := put(c.args[0], strings.Join(c.args[1:], " ")+"\n", os.O_TRUNC); err != nil {
		return c.fail(1, err)
	}
	return 0
}

func put(name, text string, flag int) error {
	if err := os.MkdirAll(filepath.Dir(path(name)), 0o700); err != nil {
		return err
	}
	f, err := os.OpenFile(path(name), os.O_CREATE|os.O_WRONLY|flag, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

func remove(c *call) int {
	for _, name := range c.args {
		if err := os.Remove(path(name)); err != nil {
			return c.fail(1, fmt.Errorf("%s: no such file", name))
		}
	}
	return 0
}

// sleep ends early by a signal or when the caller is gone.
func sleep(c *call) int {
	if len(c.args) == 0 {
		return c.fail(1, errors.New("sleep: for how long?"))
	}
	seconds, err := strconv.ParseFloat(c.args[0], 64)
	if err != nil {
		return c.fail(1, err)
	}
	t := time.NewTimer(time.Duration(seconds * float64(time.Second)))
	defer t.Stop()
	ignored := []syscall.Signal{syscall.SIGCHLD, syscall.SIGCONT, syscall.SIGWINCH, syscall.SIGURG}
	for {
		select {
		case <-t.C:
			return 0
		case <-c.ctx.Done():
			return 1
		case s := <-c.p.Signals:
			if !slices.Contains(ignored, s) {
				c.end = s
				return 128 + int(s)
			}
		}
	}
}

// shell plays "-c 'one command'", or the lines of stdin, until exit.
func shell(c *call) int {
	if len(c.args) >= 2 && strings.HasSuffix(c.args[0], "c") {
		return c.lines(strings.NewReader(c.args[1]))
	}
	if c.p.Stdin == nil {
		return 0
	}
	return c.lines(c.p.Stdin)
}

func (c *call) lines(in io.Reader) int {
	code := 0
	for s := bufio.NewScanner(in); s.Scan(); {
		for command := range strings.SplitSeq(s.Text(), ";") {
			words := strings.Fields(command)
			if len(words) == 0 {
				continue
			}
			code = c.play(words)
			if words[0] == "exit" || c.end != 0 {
				return code
			}
		}
	}
	return code
}
