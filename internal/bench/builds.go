package bench

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"time"

	"banger/internal/debian"
	"banger/internal/image"
	"banger/internal/system"
)

const (
	bootstrapFile    = "bootstrap.json" // in the cache: measured where the network is reached
	bootstrapTimeout = 30 * time.Minute
	bootstrapRatio   = 1.5
)

// bootstrapTimes are seconds of making the default image, and of mmdebstrap alone with the same packages.
type bootstrapTimes struct{ Ours, Plain float64 }

// bootstraps measures what needs a mirror of Debian, and keeps it for the report. VMs are not touched.
func (b *bench) bootstraps(ctx context.Context) (err error) {
	dir, err := os.MkdirTemp("", "bgr-bench-bootstrap-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := errors.Join(os.Mkdir(filepath.Join(dir, "images"), 0o700), os.Symlink(filepath.Join(b.state, "kernels"), filepath.Join(dir, "kernels"))); err != nil {
		return err
	}
	w, err := newWorld(b.bin, dir, fakes)
	if err != nil {
		return err
	}
	defer w.end()
	var times bootstrapTimes
	if times.Plain, err = seconds(func() error { return plainBootstrap(ctx, filepath.Join(dir, "plain.tar")) }); err != nil {
		return err
	}
	if times.Ours, err = seconds(func() error { return w.banger(ctx, nil, "setup") }); err != nil {
		return err
	}
	text, err := json.Marshal(times)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.cache, bootstrapFile), text, 0o600)
}

func plainBootstrap(ctx context.Context, out string) error {
	path, err := system.Find("mmdebstrap", "mmdebstrap")
	if err != nil {
		return err
	}
	source := debian.Source{}.WithDefaults("")
	_, err = system.Run(ctx, system.Command{Path: path, Timeout: bootstrapTimeout, Args: []string{
		"--variant=minbase", "--include=" + strings.Join(image.BasePackages(), ","), `--aptopt=Apt::Install-Recommends "false";`, source.Suite, out,
	}})
	return err
}

// builds takes a small recipe through every stage, and adds what bootstraps kept.
func (b *bench) builds(ctx context.Context) (err error) {
	if text, err := os.ReadFile(filepath.Join(b.cache, bootstrapFile)); err == nil {
		var times bootstrapTimes
		if err := json.Unmarshal(text, &times); err != nil {
			return err
		}
		base := b.add(measured("mmdebstrap alone, with the packages of the default image", "s", 0, times.Plain))
		b.add(measured("making of the default image", "s", 0, times.Ours).against(base, bootstrapRatio))
	}
	dir, err := os.MkdirTemp("", "bgr-bench-build-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := ownState(ctx, b.state, dir); err != nil {
		return err
	}
	w, err := newWorld(b.bin, dir, booting)
	if err != nil {
		return err
	}
	defer w.end()
	recipe := filepath.Join(dir, "bench")
	text := "from = \"image:debian\"\n[[step]]\nname = \"work\"\nrun = \"echo made >/srv/made\"\n"
	if err := errors.Join(os.Mkdir(recipe, 0o700), os.WriteFile(filepath.Join(recipe, "recipe.toml"), []byte(text), 0o600)); err != nil {
		return err
	}
	var built struct {
		Stages []struct {
			Stage   string
			Seconds float64
		}
	}
	if err := w.banger(ctx, &built, "image", "build", recipe, "-o", "json"); err != nil {
		return err
	}
	for _, s := range built.Stages {
		b.add(measured("build of a small recipe: "+s.Stage, "s", 0, s.Seconds))
	}
	return nil
}

// ownState is a state directory with copies of the images, as a build adds one, and the kernels of another.
func ownState(ctx context.Context, state, dir string) error {
	cp, err := system.Find("cp", "coreutils")
	if err != nil {
		return err
	}
	_, err = system.Run(ctx, system.Command{Path: cp, Args: []string{"-a", "--sparse=always", filepath.Join(state, "images"), dir}})
	return errors.Join(err, os.Symlink(filepath.Join(state, "kernels"), filepath.Join(dir, "kernels")))
}
