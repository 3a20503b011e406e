package fakefc

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"
	"unsafe"
)

// Exit codes of the process.
const (
	exitOK         = 0
	exitGeneric    = 1
	exitSegfault   = 150
	exitBadLevel   = 152
	exitArguments  = 153
	exitXCPU       = 154
	exitHangup     = 156
	flushInterval  = time.Minute
	defaultSocket  = "/run/firecracker.socket"
	defaultID      = "anonymous-instance"
	maxID          = 64
	neverListening = "it hangs before it listens, as it is to"
)

// flags are those of the command line.
type flags struct {
	socket, id       string
	logPath, level   string
	metricsPath      string
	pci              bool
	payload          int
	mmdsLimit        int
	version, help    bool
	snapshotVersion  bool
	describeSnapshot string
}

// options are the names of flags: whether they take a value, and the release they came with.
var options = map[string]struct {
	value bool
	since string
}{
	"api-sock": {true, ""}, "id": {true, ""}, "config-file": {true, ""}, "no-api": {false, ""}, "metadata": {true, ""},
	"log-path": {true, ""}, "level": {true, ""}, "module": {true, "1.6"}, "show-level": {false, ""}, "show-log-origin": {false, ""},
	"metrics-path": {true, "1.2"}, "boot-timer": {false, ""}, "seccomp-filter": {true, ""}, "no-seccomp": {false, ""},
	"enable-pci": {false, "1.13"}, "http-api-max-payload-size": {true, ""}, "mmds-size-limit": {true, "1.1"},
	"start-time-us": {true, ""}, "start-time-cpu-us": {true, ""}, "parent-cpu-time-us": {true, ""},
	"version": {false, ""}, "snapshot-version": {false, "1.7"}, "describe-snapshot": {true, ""}, "help": {false, ""},
}

// parseArguments splits the command line. Unknown, repeated and incomplete flags are errors.
func parseArguments(args []string, v version) (map[string]string, error) {
	given := map[string]string{}
	for i := 0; i < len(args); i++ {
		name, ok := strings.CutPrefix(args[i], "--")
		o, known := options[name]
		switch {
		case !ok || !known || o.since != "" && !v.atLeast(since(o.since)):
			return nil, fail("Found argument '%s' which wasn't expected, or isn't valid in this context.", strings.TrimPrefix(args[i], "--"))
		case hasKey(given, name):
			return nil, fail("The argument '%s' was provided more than once.", name)
		case o.value && i+1 == len(args):
			return nil, fail("The argument '%s' requires a value, but none was supplied.", name)
		}
		given[name] = ""
		if o.value {
			i++
			given[name] = args[i]
		}
	}
	switch {
	case hasKey(given, "no-api") && !hasKey(given, "config-file"):
		return nil, fail("Argument 'config-file' required, but not found.")
	case hasKey(given, "config-file") || hasKey(given, "metadata"):
		return nil, fail("Neither 'config-file' nor 'metadata' is understood by this fake.")
	case hasKey(given, "seccomp-filter") && hasKey(given, "no-seccomp"):
		return nil, fail("Argument 'no-seccomp' cannot be used together with argument 'seccomp-filter'.")
	}
	return given, nil
}

func hasKey(m map[string]string, name string) bool { _, ok := m[name]; return ok }

// readFlags makes sense of values; a number that is none is a panic of the process.
func readFlags(given map[string]string) flags {
	f := flags{
		socket: defaultSocket, id: defaultID, logPath: given["log-path"], level: given["level"],
		metricsPath: given["metrics-path"], pci: hasKey(given, "enable-pci"), payload: defaultPayload,
		version: hasKey(given, "version"), help: hasKey(given, "help"), snapshotVersion: hasKey(given, "snapshot-version"),
		describeSnapshot: given["describe-snapshot"],
	}
	if hasKey(given, "api-sock") {
		f.socket = given["api-sock"]
	}
	if hasKey(given, "id") {
		f.id = given["id"]
	}
	number := func(name string, to *int) {
		if text, ok := given[name]; ok {
			n, err := strconv.Atoi(text)
			if err != nil || n < 0 {
				abort("'" + name + "' parameter expected to be of 'usize' type.")
			}
			*to = n
		}
	}
	number("http-api-max-payload-size", &f.payload)
	f.mmdsLimit = f.payload
	number("mmds-size-limit", &f.mmdsLimit)
	if f.id == "" || len(f.id) > maxID || strings.Trim(strings.ToLower(f.id), "abcdefghijklmnopqrstuvwxyz0123456789-") != "" {
		abort("Invalid instance ID: " + f.id)
	}
	return f
}

// abort is a panic of the process: it ends by SIGABRT.
func abort(why string) {
	fmt.Fprintf(os.Stderr, "thread 'main' panicked: %s\n", why)
	// Go's own way with that signal is a long report and another exit.
	var byDefault [4]uint64 // of struct sigaction
	_, _, _ = syscall.RawSyscall6(syscall.SYS_RT_SIGACTION, uintptr(syscall.SIGABRT),
		uintptr(unsafe.Pointer(&byDefault)), 0, 8, 0, 0)
	_ = syscall.Kill(os.Getpid(), syscall.SIGABRT)
	select {}
}

// Main is the process: args follow the program's name. It returns the exit code.
func Main(args []string) int {
	program, err := os.Executable()
	if err != nil {
		program = os.Args[0] // in a jail, where there is no /proc
	}
	faults, err := readFaults(program)
	if err != nil {
		fmt.Fprintln(os.Stderr, "fakefc:", err)
		return exitGeneric
	}
	v, err := parseVersion(faults.version())
	if err != nil {
		fmt.Fprintln(os.Stderr, "fakefc:", err)
		return exitGeneric
	}
	log := &logger{id: defaultID, out: os.Stdout}
	given, err := parseArguments(args, v)
	if err != nil {
		log.printf("main", "Arguments parsing error: %s", err)
		fmt.Fprintln(os.Stderr, "Error:", err)
		return leave(log, exitArguments)
	}
	return process(faults, v, readFlags(given), log)
}

// leave logs the end, which also follows what is not said in the log.
func leave(log *logger, code int) int {
	if code == exitOK {
		log.printf("main", "Firecracker exiting successfully. exit_code=0")
	} else {
		log.printf("main", "Firecracker exiting with error. exit_code=%d", code)
	}
	return code
}

func process(faults Faults, v version, f flags, log *logger) int {
	log.id = f.id
	switch {
	case f.help:
		fmt.Println("a fake Firecracker for tests; its flags are those of the real one")
		return leave(log, exitOK)
	case f.version:
		fmt.Printf("Firecracker v%s\n\n", faults.version())
		return leave(log, exitOK)
	case f.snapshotVersion:
		fmt.Printf("v%s\n", v.format())
		return leave(log, exitOK)
	case f.describeSnapshot != "":
		return leave(log, describe(f.describeSnapshot, v))
	}
	if f.level != "" || f.logPath != "" {
		c := loggerConfig{}
		if f.level != "" {
			c.Level = &f.level
		}
		if f.logPath != "" {
			c.Path = &f.logPath
		}
		if err := log.set(v, c); err != nil {
			log.printf("main", "Could not initialize logger: %s", err)
			fmt.Fprintln(os.Stderr, "Error:", err)
			if c.Path != nil && canOpen(*c.Path) != nil {
				return leave(log, exitGeneric)
			}
			return leave(log, exitBadLevel)
		}
	}
	m := newMachine(faults, v, f, log)
	if f.metricsPath != "" {
		if err := m.metrics.set(v, f.metricsPath); err != nil {
			fmt.Fprintln(os.Stderr, "Error:", err)
			return leave(log, exitGeneric)
		}
	}
	log.printf("main", "Running Firecracker v%s", faults.version())
	return m.live()
}

// describe prints the format of a state file; one of another format cannot be read.
func describe(path string, v version) int {
	m := &machine{version: v}
	s, err := m.readState(path)
	if err != nil {
		fmt.Fprintln(os.Stderr, "Error:", err)
		return exitGeneric
	}
	fmt.Printf("v%s\n", s.Format)
	return exitOK
}

// live serves the API until the process ends. The socket stays behind.
func (m *machine) live() int {
	if m.faults.NoAPI {
		m.log.printf("main", neverListening)
		time.Sleep(time.Hour)
	}
	if m.faults.Exit != 0 {
		return leave(m.log, m.faults.Exit)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: m.flags.socket, Net: "unix"})
	if err != nil {
		text := apiError(m.flags.socket, err)
		m.log.printf("main", "RunWithApiError error: %s", text)
		fmt.Fprintln(os.Stderr, "Error:", text)
		return leave(m.log, exitGeneric)
	}
	l.SetUnlinkOnClose(false)
	m.log.printf("main", "Listening on API socket (%q).", m.flags.socket)
	m.log.printf("fc_api", "API server started.")
	failed := make(chan error, 1)
	go func() { failed <- newServer(m.version, m.flags.payload, m.handle).serve(l) }()
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGHUP, syscall.SIGXCPU)
	code := m.wait(signals, failed)
	m.metrics.flush()
	return leave(m.log, code)
}

// apiError words what keeps the API from its socket; only one that is there is said to be open.
func apiError(path string, err error) string {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return fmt.Sprintf("Failed to open the API socket at: %s. Check that it is not already used.", path)
	case errors.Is(err, syscall.EINVAL):
		return "Failed to bind and run the HTTP server: IO error: path must be shorter than SUN_LEN"
	}
	return "Failed to bind and run the HTTP server: IO error: " + osError(err)
}

func (m *machine) wait(signals chan os.Signal, failed chan error) int {
	orphan, flush := time.NewTicker(orphanCheck), time.NewTicker(flushInterval)
	defer orphan.Stop()
	defer flush.Stop()
	for {
		select {
		case code := <-m.end:
			m.log.printf("main", "Vmm is stopping.")
			return code
		case err := <-failed:
			m.log.printf("main", "API server: %s", err)
			return exitGeneric
		case s := <-signals:
			if s == syscall.SIGXCPU {
				return exitXCPU
			}
			return exitHangup
		case <-flush.C:
			m.metrics.flush()
		case <-orphan.C:
			if _, err := os.Stat(m.flags.socket); err != nil {
				m.log.printf("main", "the API socket is gone: this is the end of a test")
				return exitGeneric
			}
		}
	}
}
