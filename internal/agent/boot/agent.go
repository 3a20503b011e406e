package boot

import (
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// installAgent copies the running program to where the guest runs it from: the initramfs is out of reach
// once the root has changed.
func installAgent(self *os.File) error {
	out, err := os.OpenFile(AgentPath, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return fmt.Errorf("install the agent: %w", err)
	}
	if _, err := io.Copy(out, self); err != nil {
		return fmt.Errorf("install the agent: %w", err)
	}
	if err := out.Chmod(0o755); err != nil {
		return fmt.Errorf("install the agent: %w", err)
	}
	return out.Close()
}

// StartAgent starts the agent's service in a session of its own and records its pid.
func StartAgent(port string) (pid int, err error) {
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	p, err := os.StartProcess(AgentPath, []string{AgentPath, "serve", port}, &os.ProcAttr{
		Dir: "/", Env: environment(), Files: []*os.File{null, os.Stdout, os.Stderr},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return 0, fmt.Errorf("start the agent: %w", err)
	}
	pid = p.Pid
	_ = p.Release() // nothing to fail: whoever is its parent then reaps it
	return pid, write("/", strings.TrimPrefix(PIDFile, "/"), strconv.Itoa(pid)+"\n", 0o644)
}

// AgentPID returns the pid of the agent that runs, or 0.
func AgentPID() int {
	b, err := os.ReadFile(PIDFile)
	if err != nil {
		return 0
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return 0
	}
	// The pid may be another program's by now.
	exe, err := os.Readlink("/proc/" + strconv.Itoa(pid) + "/exe")
	if err != nil || exe != AgentPath {
		return 0
	}
	return pid
}
