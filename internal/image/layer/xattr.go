package layer

import (
	"encoding/binary"
	"strings"

	"banger/internal/disk"
)

// xattrRecord begins the PAX record of an extended attribute.
const xattrRecord = "SCHILY.xattr."

// KeepAttributes returns the PAX records of the extended attributes that a file of an image can have, in the form in which ext4
// stores them, and the names of those that it has no room for. What it returned it does not take again.
func KeepAttributes(records map[string]string) (kept map[string]string, left []string) {
	values := map[string]string{}
	for key, value := range records {
		if key, value, ok := keepXattr(key, value); ok {
			values[strings.TrimPrefix(key, xattrRecord)] = value
		}
	}
	names, left := disk.CompactRoom.Fit(values)
	for _, name := range names {
		if kept == nil {
			kept = map[string]string{}
		}
		kept[xattrRecord+name] = values[name]
	}
	return kept, left
}

// keepXattr returns an extended attribute as ext4 stores it. Left out are those that mean something to the overlay
// above the image, and those of other systems.
func keepXattr(key, value string) (string, string, bool) {
	name, ok := strings.CutPrefix(key, xattrRecord)
	switch {
	case !ok || strings.HasPrefix(name, "trusted.overlay."):
		return "", "", false
	case name == "system.posix_acl_access" || name == "system.posix_acl_default":
		acl, ok := diskACL(value)
		return key, acl, ok
	case strings.HasPrefix(name, "user."), strings.HasPrefix(name, "trusted."), strings.HasPrefix(name, "security."):
		return key, value, len(name) < 256 && !strings.HasSuffix(name, ".") // a namespace is no name
	}
	return "", "", false
}

// diskACL makes the form of an access list that ext4 has on disk (linux/fs/ext4/acl.h: version 1, no ids where
// they mean nothing) of the one that programs see (linux/posix_acl_xattr.h: version 2, eight bytes each).
func diskACL(value string) (string, bool) {
	const named = 0x02 | 0x08 // ACL_USER, ACL_GROUP: the entries with an id
	b := []byte(value)
	if len(b) < 4 || (len(b)-4)%8 != 0 || binary.LittleEndian.Uint32(b) != 2 {
		return "", false
	}
	out := binary.LittleEndian.AppendUint32(nil, 1)
	for e := b[4:]; len(e) > 0; e = e[8:] {
		out = append(out, e[:4]...)
		if binary.LittleEndian.Uint16(e)&named != 0 {
			out = append(out, e[4:8]...)
		}
	}
	return string(out), true
}
