// Package template keeps templates: VMs booted once and saved with memory and disks, which new VMs are
// restored from. A template is a directory named by the hash of everything that went in; it appears whole
// or not at all and is never changed afterwards, only removed. Who makes and who uses them is the engine's.
package template

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"time"

	"banger/internal/vmm"
)

// Files of a template's directory beside those that the driver saves (vmm.SavedManifest and so on).
const (
	ManifestFile = "template.json"
	useFile      = "use.json" // how often and when it was used last; its loss harms nothing
)

// format is part of the key: raise it when a template of an earlier banger must not be used any more for a
// reason that no other field of Shape tells. 2: checksums in the manifest.
const format = 2

// Shape is everything that goes into a template: VMs of equal shape are restored from the same one. What a
// restored guest can be told afterwards (its name, keys, address) is no part of it.
type Shape struct {
	Format int `json:"format"`

	Image         string   `json:"image"`
	ImageDigest   string   `json:"image_digest"`
	Kernel        string   `json:"kernel"`
	KernelDigest  string   `json:"kernel_digest"`
	Initramfs     string   `json:"initramfs"` // content hash; the agent is inside
	VMM           string   `json:"vmm"`       // the driver
	VMMVersion    string   `json:"vmm_version"`
	Accelerator   string   `json:"accelerator"`
	CPUs          int      `json:"cpus"`
	MemoryBytes   int64    `json:"memory_bytes"`
	DiskBytes     int64    `json:"disk_bytes"`      // of the template's own disks: clones may have larger ones
	WorkDiskBytes int64    `json:"work_disk_bytes"` // the same
	Units         string   `json:"units"`
	MaskedUnits   []string `json:"masked_units"`
	PlainDirs     []string `json:"plain_dirs"`
	Cmdline       []string `json:"cmdline"`
	Interfaces    int      `json:"interfaces"`
	Nameservers   []string `json:"nameservers"`
}

// keyBytes of the hash make the key: sixteen hex digits.
const keyBytes = 8

// Key names the template of this shape.
func (s Shape) Key() string {
	s.Format = format
	text, err := json.Marshal(s) // the order of a struct's fields is fixed: equal shapes have equal texts
	if err != nil {
		panic(fmt.Sprintf("template: a shape cannot be encoded: %v", err)) // strings and numbers always can
	}
	sum := sha256.Sum256(text)
	return hex.EncodeToString(sum[:keyBytes])
}

// File is one file of a template as it was when the template was made.
type File struct {
	Name    string `json:"name"`
	Size    int64  `json:"size"`   // bytes, holes included
	ModTime int64  `json:"mtime"`  // nanoseconds since the Unix epoch
	CRC32C  uint32 `json:"crc32c"` // disk.Sum
}

// Manifest is the content of template.json.
type Manifest struct {
	Key       string    `json:"key"`
	Shape     Shape     `json:"shape"`
	CreatedAt time.Time `json:"created_at"`
	SizeBytes int64     `json:"size_bytes"` // what the files take on disk
	Files     []File    `json:"files"`
}

// Template is a template in its place.
type Template struct {
	Manifest
	Dir        string // absolute
	Uses       int64
	LastUsedAt time.Time // zero: never
	Problem    string    // why it cannot be used; only List returns such templates
}

// use is the content of use.json.
type use struct {
	Uses       int64     `json:"uses"`
	LastUsedAt time.Time `json:"last_used_at"`
}

// required are the files without which a directory is no template.
var required = []string{vmm.SavedManifest, vmm.SavedState, vmm.SavedMemory}
