package helper

import (
	"encoding/binary"
	"fmt"
	"net"
	"regexp"
	"strconv"

	"github.com/vishvananda/netlink"
)

// owner says whose a device is: a user's, and one banger of that user's.
type owner struct {
	uid      int
	instance string // "" is any
}

var markText = regexp.MustCompile(`^banger uid=([0-9]{1,10})(?: instance=([a-z0-9]{1,32}))?$`)

// mark is the ifalias that devices of an owner carry.
func (o owner) mark() string {
	if o.instance == "" {
		return fmt.Sprintf("banger uid=%d", o.uid)
	}
	return fmt.Sprintf("banger uid=%d instance=%s", o.uid, o.instance)
}

// parseMark reads an ifalias; false when it is no mark of banger's.
func parseMark(alias string) (owner, bool) {
	m := markText.FindStringSubmatch(alias)
	if m == nil {
		return owner{}, false
	}
	uid, err := strconv.ParseUint(m[1], 10, 32)
	return owner{int(uid), m[2]}, err == nil
}

// sameInstance tells whether two owners of one user are the same banger.
func (o owner) sameInstance(other owner) bool {
	return o.instance == "" || other.instance == "" || o.instance == other.instance
}

// owns tells whether a device is marked as this owner's.
func (o owner) owns(link netlink.Link) bool {
	marked, ok := parseMark(link.Attrs().Alias)
	return ok && marked.uid == o.uid && o.sameInstance(marked)
}

// bridgeMAC is the Ethernet address of a user's bridges: locally administered, 02:b5 and the uid. It
// stays the same when the bridge is made anew, so guests keep knowing their gateway; and because it
// is set by the very call that makes the bridge, it tells one that got no further as ours.
func (o owner) bridgeMAC() net.HardwareAddr {
	return binary.BigEndian.AppendUint32(net.HardwareAddr{0x02, 0xb5}, uint32(o.uid))
}
