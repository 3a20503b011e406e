package boot

import (
	"fmt"
	"testing"

	"golang.org/x/sys/unix"
)

func TestStaticNodes(t *testing.T) {
	const text = `# Device nodes to trigger on-demand module loading.
fuse fuse c10:229
tun net/tun c10:200
loop loop-control c10:237
btrfs btrfs-control c10:234
x b b7:0
evil ../../etc/x c1:1
broken line
odd odd z1:2
`
	got := staticNodes(text)
	want := []node{
		{"fuse", 0o666 | unix.S_IFCHR, 10, 229},
		{"net/tun", 0o666 | unix.S_IFCHR, 10, 200},
		{"loop-control", 0o600 | unix.S_IFCHR, 10, 237},
		{"btrfs-control", 0o600 | unix.S_IFCHR, 10, 234},
		{"b", 0o600 | unix.S_IFBLK, 7, 0},
	}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("got %v, want %v", got, want)
	}
}
