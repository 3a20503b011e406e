package wire

import (
	bangerv1 "banger/api/banger/v1"
	"banger/internal/snapshot"
)

// Snapshot makes the API's form of a snapshot.
func Snapshot(s snapshot.Snapshot) *bangerv1.Snapshot {
	return &bangerv1.Snapshot{
		Tag: s.Tag, CreatedAt: timestamp(s.CreatedAt), Note: s.Note, Labels: s.Labels, Kind: string(s.Kind), State: s.State,
		Image: s.Image, Kernel: s.Kernel, Driver: s.Driver, DriverVersion: s.DriverVersion,
		ApparentBytes: s.ApparentBytes, RealBytes: s.RealBytes, PauseNanos: int64(s.PausedFor), Problem: s.Problem, Directory: s.Dir,
	}
}
