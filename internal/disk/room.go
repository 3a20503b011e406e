package disk

import (
	"encoding/binary"
	"maps"
	"slices"
	"strings"
)

// Room is what a file of an ext4 has for its extended attributes, in bytes: in its inode, and in a block besides.
type Room struct{ Inode, Block int }

// CompactRoom is what WriteExt4's files have (hcsshim's ext4/internal/compactext4).
var CompactRoom = Room{Inode: 96, Block: 4060}

const (
	oldInode    = 128    // bytes of an inode that every ext2 had already
	inodeHeader = 4 + 4  // around the attributes in an inode: the magic number, the end
	blockHeader = 32 + 4 // around those in a block
)

// roomOf returns what the files of the ext4 at path have.
func roomOf(path string) (Room, error) {
	b, err := superblock(path)
	if err != nil {
		return Room{}, err
	}
	le := binary.LittleEndian
	inode, extra := int(le.Uint16(b[0x58:])), int(le.Uint16(b[0x15e:])) // s_inode_size, s_want_extra_isize
	return Room{Inode: inode - oldInode - extra - inodeHeader, Block: 1024<<le.Uint32(b[0x18:]) - blockHeader}, nil
}

// Fit returns the names of the attributes that find room, and of those that do not, both sorted. Given are their values by
// name, such as "user.comment". They have to be written in this order.
func (r Room) Fit(values map[string]string) (kept, left []string) {
	for _, name := range slices.Sorted(maps.Keys(values)) {
		switch size := attributeSize(name, values[name]); {
		case size <= r.Inode:
			r.Inode -= size
		case size <= r.Block:
			r.Block -= size
		default:
			left = append(left, name)
			continue
		}
		kept = append(kept, name)
	}
	return kept, left
}

// attributeSize is what an attribute takes: an entry of 16 bytes with the name without its namespace, and the value, both in
// fours (Documentation/filesystems/ext4/attributes.rst).
func attributeSize(name, value string) int {
	if _, after, ok := strings.Cut(name, "."); ok {
		name = after // of an access list nothing is left; to count it all the same does no harm
	}
	return entryHeader + (len(name)+3)&^3 + (len(value)+3)&^3
}
