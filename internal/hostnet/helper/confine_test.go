package helper

import (
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	landlocksys "github.com/landlock-lsm/go-landlock/landlock/syscall"
	"github.com/vishvananda/netlink"

	"banger/internal/hosttest"
	"banger/internal/hosttest/need"
)

// TestMain is also a program that confines itself and says what it still can do.
func TestMain(m *testing.M) {
	if filepath.Base(os.Args[0]) == "confined" {
		probe()
	}
	os.Exit(m.Run())
}

func probe() {
	if right, err := confine(slog.New(slog.NewTextHandler(io.Discard, nil))); err != nil || !right {
		fmt.Println("confine:", right, err)
		os.Exit(1)
	}
	for _, path := range []string{"/etc/passwd", os.Args[1], tunDevice, ipForward} {
		f, err := os.OpenFile(path, os.O_RDWR, 0)
		fmt.Printf("%s: %v\n", path, !errors.Is(err, os.ErrPermission))
		f.Close()
	}
	tun, err := openTAP("bgr-00000001", 1000)
	fmt.Println("tap:", err)
	tun.Close()
	fmt.Println("chown:", os.Chown(os.Args[1], 1, 1) == nil)
	fmt.Println("exec:", exec.Command("/bin/true").Run() == nil)
	_, err = netlink.LinkList()
	fmt.Println("links:", err == nil)
	os.Exit(0)
}

func TestConfinement(t *testing.T) {
	need.Root(t)
	v, err := landlocksys.LandlockGetABIVersion()
	need.Kernel(t, "Landlock", err == nil && v >= 1)
	hosttest.NetNS(t)
	dir := t.TempDir()
	own, name := filepath.Join(dir, "own"), filepath.Join(dir, "confined")
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.WriteFile(own, nil, 0o600), os.Symlink(self, name)); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command(name, own).CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, want := range []string{
		"/etc/passwd: false", own + ": false", tunDevice + ": true", ipForward + ": true", "tap: <nil>", "chown: false", "exec: false", "links: true",
	} {
		if !strings.Contains(string(out), want+"\n") {
			t.Errorf("%q is not in\n%s", want, out)
		}
	}
}

func TestMarks(t *testing.T) {
	for _, o := range []owner{{0, ""}, {1000, "a1"}, {1<<32 - 2, strings.Repeat("z", 32)}} {
		if got, ok := parseMark(o.mark()); !ok || got != o {
			t.Errorf("%q gives %+v %v", o.mark(), got, ok)
		}
	}
	for _, alias := range []string{"", "banger", "banger uid=", "banger uid=-1", "banger uid=99999999999", "banger uid=9999999999", "banger uid=1 ", "banger uid=1 instance=", "banger uid=1\n", "x banger uid=1"} {
		if got, ok := parseMark(alias); ok {
			t.Errorf("%q gives %+v", alias, got)
		}
	}
	if got := (owner{uid: 1000}).bridgeMAC().String(); got != "02:b5:00:00:03:e8" {
		t.Errorf("MAC %s", got)
	}
}
