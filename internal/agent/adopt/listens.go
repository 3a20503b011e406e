package adopt

import (
	"bufio"
	"errors"
	"io/fs"
	"os"
	"strings"
)

// SSHListens tells whether an SSH server listens on port 22, and knows whose it is: not one that is about to read its
// keys again.
func (g *Guest) SSHListens() (bool, error) {
	g.want(false)
	if g.reading() {
		return false, nil
	}
	for _, table := range []string{"/proc/net/tcp", "/proc/net/tcp6"} {
		f, err := os.Open(table)
		if errors.Is(err, fs.ErrNotExist) { // a kernel without IPv6
			continue
		}
		if err != nil {
			return false, err
		}
		listens := listensOn(bufio.NewScanner(f), ":0016")
		f.Close()
		if listens {
			return true, nil
		}
	}
	return false, nil
}

// reading tells whether an sshd that was told to has not read its keys yet.
func (g *Guest) reading() bool {
	g.sshdMu.Lock()
	defer g.sshdMu.Unlock()
	if g.sshd == nil {
		return false
	}
	if hasRestarted(g.sshd.pid, g.sshd.before) {
		g.sshd = nil
		return false
	}
	return true
}

// listensOn finds a socket that listens on a port, as ":0016", in /proc/net/tcp: after a number come its own address, the
// other one, and its state, of which 0A is to listen (Documentation/networking/proc_net_tcp.rst).
func listensOn(lines *bufio.Scanner, port string) bool {
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) > 3 && strings.HasSuffix(fields[1], port) && fields[3] == "0A" {
			return true
		}
	}
	return false
}
