package wire

import (
	bangerv1 "banger/api/banger/v1"
	"banger/internal/template"
)

// Template makes the API's form of a template.
func Template(t template.Template) *bangerv1.Template {
	s := t.Shape
	return &bangerv1.Template{
		Key: t.Key, Image: s.Image, Kernel: s.Kernel, Vmm: s.VMM, Cpus: int32(s.CPUs), MemoryBytes: s.MemoryBytes,
		Units: s.Units, SizeBytes: t.SizeBytes, CreatedAt: timestamp(t.CreatedAt), LastUsedAt: timestamp(t.LastUsedAt),
		Uses: t.Uses, Problem: t.Problem, Directory: t.Dir,
	}
}
