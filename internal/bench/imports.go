package bench

import (
	"archive/tar"
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"

	"banger/internal/system"
)

// The tree that is imported: as many small files as a development image has, and some large ones.
const (
	importSmall      = 30_000
	importLarge      = 24
	importSmallBytes = 24 << 10 // on average
	importLargeBytes = 56 << 20
	importRounds     = 3

	importTimeout  = 10 * time.Minute
	importMemoryMB = 200
	importRatio    = 2 // of the time: half the speed
)

// imports compares the import of a tar with what one would do by hand as root: unpack it and have mke2fs write the tree.
func (b *bench) imports(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "bgr-bench-import-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	archive, state := filepath.Join(dir, "tree.tar"), filepath.Join(dir, "state")
	if err := errors.Join(os.MkdirAll(filepath.Join(state, "images"), 0o700), os.Mkdir(filepath.Join(state, "kernels"), 0o700), writeTree(archive)); err != nil {
		return err
	}
	w, err := newWorld(b.bin, state, fakes) // not the images that others use
	if err != nil {
		return err
	}
	defer w.end()
	var ours, theirs []float64
	for i := range importRounds {
		name := fmt.Sprintf("bench%d", i)
		took, err := seconds(func() error { return w.banger(ctx, nil, "image", "import", archive, "--name", name) })
		if err != nil {
			return err
		}
		if err := w.banger(ctx, nil, "image", "delete", "--yes", name); err != nil {
			return err
		}
		hand, err := seconds(func() error { return unpackAndMake(ctx, dir, archive) })
		if err != nil {
			return err
		}
		ours, theirs = append(ours, took), append(theirs, hand)
	}
	memory, err := w.peakMemory(ctx)
	if err != nil {
		return err
	}
	base := b.add(measured("tar -x and mke2fs -d of a 2 GB tree", "s", 0, theirs...))
	b.add(measured("image import of the same tree as a tar", "s", 0, ours...).against(base, importRatio))
	b.add(measured("memory of the daemon at most, meanwhile", "MB", importMemoryMB, memory))
	return nil
}

// writeTree writes the tree as a tar, with content that is the same in each run and cannot be packed away.
func writeTree(path string) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	buffered := bufio.NewWriterSize(f, 1<<20)
	w := tar.NewWriter(buffered)
	random := rand.New(rand.NewPCG(6, 4))
	bytes := rand.NewChaCha8([32]byte{6})
	put := func(name string, size int64) error {
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: size}); err != nil {
			return err
		}
		_, err := io.CopyN(w, bytes, size)
		return err
	}
	for i := range importSmall {
		if err := put(fmt.Sprintf("usr/share/%d/%d/file%d", i%40, i%300, i), random.Int64N(2*importSmallBytes)); err != nil {
			return err
		}
	}
	for i := range importLarge {
		if err := put(fmt.Sprintf("usr/lib/large%d", i), importLargeBytes); err != nil {
			return err
		}
	}
	return errors.Join(w.Close(), buffered.Flush())
}

func unpackAndMake(ctx context.Context, dir, archive string) error {
	tree, image := filepath.Join(dir, "tree"), filepath.Join(dir, "tree.ext4")
	if err := os.Mkdir(tree, 0o755); err != nil {
		return err
	}
	for _, c := range []struct {
		program, of string
		args        []string
	}{
		{"tar", "tar", []string{"-C", tree, "-xf", archive}},
		{"mke2fs", "e2fsprogs", []string{"-q", "-t", "ext4", "-d", tree, image, "4G"}},
	} {
		path, err := system.Find(c.program, c.of)
		if err != nil {
			return err
		}
		if _, err := system.Run(ctx, system.Command{Path: path, Args: c.args, Timeout: importTimeout}); err != nil {
			return err
		}
	}
	return errors.Join(os.RemoveAll(tree), os.Remove(image))
}

// peakMemory is what the world's daemon had in memory at most since it started, in MB (proc_pid_status(5): VmHWM).
func (w *world) peakMemory(ctx context.Context) (float64, error) {
	var status struct{ PID int }
	if err := w.banger(ctx, &status, "daemon", "status", "-o", "json"); err != nil {
		return 0, err
	}
	kib, err := statusField(fmt.Sprintf("/proc/%d/status", status.PID), "VmHWM")
	return float64(kib) * 1024 / 1e6, err
}
