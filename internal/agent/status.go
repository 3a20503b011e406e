package agent

import (
	"bufio"
	"context"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	agentv1 "banger/api/agent/v1"
	"banger/internal/agent/run"
)

// systemctlTimeout bounds one question to systemd: under software emulation it takes half a second.
const systemctlTimeout = 10 * time.Second

// status looks at the guest from inside. What cannot be read is left out.
func status(ctx context.Context) (*agentv1.StatusResponse, error) {
	s := &agentv1.StatusResponse{UnixNanos: time.Now().UnixNano()}
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, err
	}
	s.Hostname = unix.ByteSliceToString(u.Nodename[:])
	s.KernelRelease = unix.ByteSliceToString(u.Release[:])
	s.SystemState, s.FailedUnits = systemState(ctx)
	s.Load1 = load1(read("/proc/loadavg"))
	s.MemoryTotalBytes, s.MemoryAvailableBytes = memory(read("/proc/meminfo"))
	for _, dir := range []string{"/", "/root"} {
		if f := filesystem(dir); f != nil {
			s.Filesystems = append(s.Filesystems, f)
		}
	}
	s.SshListening = listening(read("/proc/net/tcp"), 22) || listening(read("/proc/net/tcp6"), 22)
	return s, nil
}

// read returns a small file of the kernel's, or "".
func read(name string) string {
	b, err := os.ReadFile(name)
	if err != nil {
		return ""
	}
	return string(b)
}

// systemState asks systemd how it is.
func systemState(ctx context.Context) (state string, failed []string) {
	switch {
	case firstProcess() != systemd:
		return "none", nil
	case !systemdListens():
		return "starting", nil
	}
	// Its exit code tells the state again.
	out, err := run.Output(ctx, systemctlTimeout, "/usr/bin/systemctl", "is-system-running")
	state = strings.TrimSpace(string(out))
	if state == "" && err != nil {
		return "unknown", nil
	}
	if state != "degraded" {
		return state, nil
	}
	out, err = run.Output(ctx, systemctlTimeout, "/usr/bin/systemctl", "list-units", "--state=failed", "--plain", "--no-legend", "--no-pager")
	if err != nil {
		return state, nil
	}
	for line := range strings.Lines(string(out)) {
		if f := strings.Fields(line); len(f) > 0 {
			failed = append(failed, f[0])
		}
	}
	return state, failed
}

func load1(text string) float64 {
	first, _, _ := strings.Cut(text, " ")
	f, _ := strconv.ParseFloat(first, 64) // 0 when it cannot be read
	return f
}

// memory reads /proc/meminfo, whose unit is KiB.
func memory(text string) (total, available int64) {
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 2 {
			continue
		}
		kib, err := strconv.ParseInt(f[1], 10, 64)
		if err != nil {
			continue
		}
		switch f[0] {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			available = kib << 10
		}
	}
	return total, available
}

func filesystem(dir string) *agentv1.FilesystemUse {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return nil
	}
	return &agentv1.FilesystemUse{
		MountPoint: dir, TotalBytes: int64(st.Blocks) * st.Bsize, AvailableBytes: int64(st.Bavail) * st.Bsize,
	}
}

// listening finds a listening socket on port in the text of /proc/net/tcp or tcp6.
func listening(text string, port int) bool {
	const stateListen = "0A"
	for s := bufio.NewScanner(strings.NewReader(text)); s.Scan(); {
		f := strings.Fields(s.Text())
		if len(f) < 4 || f[3] != stateListen {
			continue
		}
		i := strings.LastIndexByte(f[1], ':')
		if n, err := strconv.ParseUint(f[1][i+1:], 16, 16); err == nil && int(n) == port {
			return true
		}
	}
	return false
}
