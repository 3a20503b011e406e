package disk

import (
	"bytes"
	"cmp"
	"encoding/binary"
	"errors"
	"io"
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
	if perGroup == 0 || le.Uint32(super[0x18:]) != 2 || g.perGroup > compactBlock*8 || g.inodeSize < inodeACL+4 {
		return g, errors.New("unexpected file system geometry")
	}
	g.groups = (blocks + perGroup - 1) / perGroup
	g.descriptors = make([]byte, g.groups*compactDescriptor)
	return g, readAt(f, g.descriptors, compactBlock)
}

// sortAttributes puts the extended attributes in each attribute block into the order that the kernel looks them up by.
// tar2ext4 compares the three parts of that order side by side instead of one after the other: with more than a dozen in a
// block some are listed and cannot be read.
func sortAttributes(f io.ReadWriteSeeker, g geometry) error {
	table := make([]byte, g.perGroup*g.inodeSize)
	for i := range g.groups {
		at := binary.LittleEndian.Uint32(g.descriptors[i*compactDescriptor+8:])
		if err := readAt(f, table, int64(at)*compactBlock); err != nil {
			return err
		}
		for inode := table; len(inode) > 0; inode = inode[g.inodeSize:] {
			block := binary.LittleEndian.Uint32(inode[inodeACL:])
			if block == 0 {
				continue
			}
			if err := sortBlock(f, int64(block)*compactBlock); err != nil {
				return err
			}
		}
	}
	return nil
}

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
	if _, err := f.Seek(at, io.SeekStart); err != nil {
		return err
	}
	_, err := f.Write(block)
	return err
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
