package adopt

import (
	"bufio"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestListensOn(t *testing.T) {
	const text = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:0050 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1
   1: 0100007F:0016 0100007F:D431 01 00000000:00000000 00:00000000 00000000     0        0 2
   2: 0100007F:D431 0100007F:0017 01 00000000:00000000 00:00000000 00000000     0        0 3
`
	for port, want := range map[string]bool{":0050": true, ":0016": false, ":D431": false, ":0017": false} {
		if got := listensOn(bufio.NewScanner(strings.NewReader(text)), port); got != want {
			t.Errorf("%s: %v", port, got)
		}
	}
}

// The kernel's own table has the port that we listen on.
func TestListensOnThisKernel(t *testing.T) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	table, err := os.Open("/proc/net/tcp")
	if err != nil {
		t.Fatal(err)
	}
	defer table.Close()
	if !listensOn(bufio.NewScanner(table), hexPort(l.Addr().(*net.TCPAddr).Port)) {
		t.Error("not found")
	}
}

func hexPort(port int) string {
	const digits = "0123456789ABCDEF"
	return ":" + string([]byte{digits[port>>12&15], digits[port>>8&15], digits[port>>4&15], digits[port&15]})
}

// An sshd that was told to read its keys again does not know whose it is until it has: it goes on listening meanwhile.
func TestSSHDThatReads(t *testing.T) {
	file := filepath.Join(t.TempDir(), "sshd.pid")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	before, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	g := &Guest{sshd: &restart{pid: 1 << 30, before: before}}
	if g.reading() || g.sshd != nil { // there is no such process
		t.Error("an sshd that is gone is waited for")
	}
	if g.reading() {
		t.Error("nobody reads")
	}
}
