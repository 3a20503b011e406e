package layer

import (
	"encoding/binary"
	"maps"
	"slices"
	"strings"
)

// xattrRecord begins the PAX record of an extended attribute.
const xattrRecord = "SCHILY.xattr."

// What the compact ext4 has room for: in an inode of 256 bytes, and in one block besides
// (hcsshim's ext4/internal/compactext4, which fills them in the order of the names).
const (
	inodeRoom = 96
	blockRoom = 4060
)

// keepAttributes returns the records of the extended attributes that a file of ext4 can have, and the names of those that it
// has no room for.
func keepAttributes(records map[string]string) (kept map[string]string, left []string) {
	inode, block := inodeRoom, blockRoom
	for _, k := range slices.Sorted(maps.Keys(records)) {
		key, value, ok := keepXattr(k, records[k])
		if !ok {
			continue
		}
		name := strings.TrimPrefix(key, xattrRecord)
		switch size := attributeSize(name, value); {
		case size <= inode:
			inode -= size
		case size <= block:
			block -= size
		default:
			left = append(left, name)
			continue
		}
		if kept == nil {
			kept = map[string]string{}
		}
		kept[key] = value
	}
	return kept, left
}

// attributeSize is what an attribute takes: an entry of 16 bytes with the name without its namespace, and the value, both in
// fours (Documentation/filesystems/ext4/attributes.rst).
func attributeSize(name, value string) int {
	if _, after, ok := strings.Cut(name, "."); ok {
		name = after // of an access list nothing is left; to count it all the same does no harm
	}
	return 16 + (len(name)+3)&^3 + (len(value)+3)&^3
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
		return key, value, len(name) < 256
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
