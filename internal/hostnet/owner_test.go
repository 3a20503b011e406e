package hostnet_test

import (
	"io"
	"os/exec"
	"testing"

	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

// ownTable makes a table as firewalld 2 does: as long as its maker has the socket open, nobody else can change it.
func ownTable(t *testing.T, ns *hosttest.NS) (end func()) {
	t.Helper()
	nft := exec.Command(need.Binary(t, "nft"), "-i")
	stdin, err := nft.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := ns.Do(nft.Start); err != nil {
		t.Fatal(err)
	}
	_, err = io.WriteString(stdin, "add table inet firewalld { flags owner; }\n"+
		"add chain inet firewalld filter_FORWARD { type filter hook forward priority filter; policy drop; }\n"+
		"add chain inet firewalld done\n")
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, func() bool {
		_, err := ns.Try("nft", "list", "chain", "inet", "firewalld", "done")
		return err == nil
	})
	return func() {
		stdin.Close()
		_ = nft.Wait() // what it thinks of its end is of no interest
	}
}
