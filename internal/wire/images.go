package wire

import (
	bangerv1 "banger/api/banger/v1"
	"banger/internal/image"
	"banger/internal/kernel"
)

// Image makes the API's form of an image; defaultFrom is what makes it the default, "" when it is not; usedBy are the names of the
// VMs that use it.
func Image(i image.Image, defaultFrom string, usedBy []string) *bangerv1.Image {
	return &bangerv1.Image{
		Name: i.Name, Digest: i.Digest, Description: i.Description, Architecture: i.Architecture,
		SizeBytes: i.RootBytes, WorkSeedBytes: i.WorkSeedBytes, PackageCount: int32(len(i.Packages)),
		CreatedAt: timestamp(i.CreatedAt), IsDefault: defaultFrom != "", DefaultFrom: defaultFrom, UsedBy: usedBy, Problem: i.Problem, Directory: i.Dir,
		Aliases: i.Aliases, Source: i.Manifest.Source, SourceDigest: i.Manifest.SourceDigest, Skipped: i.Manifest.Skipped,
		Notice: i.Notice,
	}
}

// Stages makes the API's form of how long the stages of a build took.
func Stages(all []image.StageTime) (times []*bangerv1.StageTime) {
	for _, t := range all {
		times = append(times, &bangerv1.StageTime{Stage: t.Stage, Seconds: t.Seconds})
	}
	return times
}

// Kernel makes the API's form of a kernel; defaultFrom and usedBy are as for Image.
func Kernel(k kernel.Kernel, defaultFrom string, usedBy []string) *bangerv1.Kernel {
	m := &bangerv1.Kernel{
		Name: k.Name, Release: k.Release, Architecture: k.Architecture, IsDefault: defaultFrom != "", DefaultFrom: defaultFrom,
		Problem: k.Problem, Directory: k.Dir, UsedBy: usedBy, CreatedAt: timestamp(k.CreatedAt), Source: k.Manifest.Source,
		Formats: k.Formats(), Version: k.Manifest.Version,
	}
	for _, f := range k.Manifest.Files {
		m.SizeBytes += f.Size
	}
	return m
}

// KernelOption makes the API's form of an option of a kernel.
func KernelOption(o kernel.Option) *bangerv1.KernelOption {
	return &bangerv1.KernelOption{Name: o.Name, Value: o.Value, Ok: o.OK, Required: o.Required, Purpose: o.Purpose}
}
