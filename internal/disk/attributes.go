package disk

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"io"
	"math"
	"slices"
)

// Sizes of the file systems that tar2ext4 writes.
const (
	compactBlock      = 4096
	compactDescriptor = 32
)

// Places in ext4's structures: the kernel's Documentation/filesystems/ext4/{inodes,attributes}.rst.
const (
	inodeACL       = 0x68 // i_file_acl_lo: the block with the extended attributes
	firstEntry     = 32   // first entry in that block
	leastInode     = 0x98 // bytes up to the last of the times
	entryHeader    = 16   // bytes before an entry's name
	attributeMagic = 0xEA020000
)

// geometry is what of a compact file system's superblock is needed to find its inodes.
type geometry struct {
	groups, perGroup, inodeSize uint32
	descriptors                 []byte
}

func readGeometry(f io.ReadSeeker) (g geometry, err error) {
	var super [1024]byte
	if err := readAt(f, super[:], 1024); err != nil {
		return g, err
	}
	le := binary.LittleEndian
	blocks, perGroup := le.Uint32(super[0x4:]), le.Uint32(super[0x20:])
	g.perGroup, g.inodeSize = le.Uint32(super[0x28:]), uint32(le.Uint16(super[0x58:]))
	if perGroup == 0 || le.Uint32(super[0x18:]) != 2 || g.perGroup > compactBlock*8 || g.inodeSize < leastInode {
		return g, errors.New("unexpected file system geometry")
	}
	g.groups = (blocks + perGroup - 1) / perGroup
	g.descriptors = make([]byte, g.groups*compactDescriptor)
	return g, readAt(f, g.descriptors, compactBlock)
}

// mendInodes puts right what tar2ext4 leaves wrong in or about its inodes.
func mendInodes(f io.ReadWriteSeeker, g geometry) error {
	table := make([]byte, g.perGroup*g.inodeSize)
	for i := range g.groups {
		at := int64(binary.LittleEndian.Uint32(g.descriptors[i*compactDescriptor+8:])) * compactBlock
		if err := readAt(f, table, at); err != nil {
			return err
		}
		changed := false
		for inode := table; len(inode) > 0; inode = inode[g.inodeSize:] {
			changed = mendTimes(inode) || changed
			if block := binary.LittleEndian.Uint32(inode[inodeACL:]); block != 0 {
				if err := sortBlock(f, int64(block)*compactBlock); err != nil {
					return err
				}
			}
		}
		if !changed {
			continue
		}
		if err := writeAt(f, table, at); err != nil {
			return err
		}
	}
	return nil
}

// times are the places of an inode's times, each with that of its extra bits: ctime, mtime, atime, crtime.
var times = [][2]int{{0x0c, 0x84}, {0x10, 0x88}, {0x08, 0x8c}, {0x90, 0x94}}

// mendTimes makes the times of an inode mean what was meant. The kernel reads the lower 32 bits as a signed number and adds two
// further bits, the lowest of the extra ones, 2^32 times (inodes.rst, "Inode Timestamps"); tar2ext4 just cuts a 64-bit number in
// two. So those from 2038 on are 2^32 seconds too early, and those before 1970 have all of the extra bits set.
func mendTimes(inode []byte) (changed bool) {
	le := binary.LittleEndian
	for _, at := range times {
		seconds, extra := le.Uint32(inode[at[0]:]), le.Uint32(inode[at[1]:])
		switch {
		case extra == math.MaxUint32: // below 0; there are no such nanoseconds
			le.PutUint32(inode[at[1]:], 0)
		case seconds >= 1<<31:
			le.PutUint32(inode[at[1]:], extra&^3|(extra+1)&3)
		default:
			continue
		}
		changed = true
	}
	return changed
}

// sortBlock puts the extended attributes in a block into the order that the kernel looks them up by.
// tar2ext4 compares the three parts of that order side by side instead of one after the other: with more than a dozen in a
// block some are listed and cannot be read.
func sortBlock(f io.ReadWriteSeeker, at int64) error {
	block := make([]byte, compactBlock)
	if err := readAt(f, block, at); err != nil {
		return err
	}
	if binary.LittleEndian.Uint32(block) != attributeMagic {
		return errors.New("an inode's attribute block holds no attributes")
	}
	entries, end := entriesOf(block)
	if slices.IsSortedFunc(entries, byLookup) {
		return nil
	}
	slices.SortFunc(entries, byLookup)
	copy(block[firstEntry:end], bytes.Join(entries, nil))
	return writeAt(f, block, at)
}

// entriesOf returns the entries of a block, and where they end. The values, which they point to, stay where they are.
func entriesOf(block []byte) (entries [][]byte, end int) {
	for end = firstEntry; end+entryHeader < len(block) && block[end] != 0; {
		size := entryHeader + (int(block[end])+3)&^3
		if end+size > len(block) {
			break
		}
		entries = append(entries, bytes.Clone(block[end:end+size]))
		end += size
	}
	return entries, end
}

// byLookup is the order of fs/ext4/xattr.c: the namespace's index, the length of the name, the name.
func byLookup(a, b []byte) int {
	return cmp.Or(cmp.Compare(a[1], b[1]), cmp.Compare(a[0], b[0]), bytes.Compare(a[entryHeader:entryHeader+int(a[0])], b[entryHeader:entryHeader+int(b[0])]))
}
