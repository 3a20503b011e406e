package bench

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
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
	bootstrapRounds  = 2 // each takes a minute or two

	defaultImageMB = 250
	builtBootRatio = 1.25
)

// buildRatios bound the stages of the build of a small recipe, as ratios to a stock boot until SSH, with which most of them have in
// common that a processor is emulated where there is no KVM. "" is the whole build. They are some two and a half times what was seen.
var buildRatios = map[string]float64{
	"base": 0.05, "boot": 0.25, "ssh": 0.4, "provision": 0.15, "scrub": 0.1, "export": 1, "": 1.5,
}

// bootstrapTimes are seconds of making the default image, and of mmdebstrap alone with the same packages, in turns; or why there are
// none.
type bootstrapTimes struct {
	Ours, Plain []float64
	Missing     string
}

// bootstraps measures what needs a mirror of Debian, and keeps it for the report. VMs are not touched. Where no mirror answers,
// that is kept.
func (b *bench) bootstraps(ctx context.Context) (err error) {
	var times bootstrapTimes
	if times.Missing, err = mirrorTrouble(ctx); err != nil {
		return err
	}
	if times.Missing == "" {
		if times, err = b.bootstrapTimes(ctx); err != nil {
			return err
		}
	}
	text, err := json.Marshal(times)
	if err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(b.cache, bootstrapFile), text, 0o600)
}

// mirrorTrouble asks Debian's mirror as setup does, by apt, and returns why it does not answer.
func mirrorTrouble(ctx context.Context) (trouble string, err error) {
	dir, err := os.MkdirTemp("", "bgr-bench-apt-")
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	apt, err := debian.OpenApt(ctx, dir, debian.Source{}.WithDefaults(runtime.GOARCH))
	if err != nil {
		return "", err
	}
	if err := apt.Update(ctx); err != nil {
		trouble, _, _ = strings.Cut(err.Error(), "\n")
	}
	return trouble, ctx.Err()
}

func (b *bench) bootstrapTimes(ctx context.Context) (times bootstrapTimes, err error) {
	dir, err := os.MkdirTemp("", "bgr-bench-bootstrap-")
	if err != nil {
		return times, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	for i := range bootstrapRounds {
		plain, err := seconds(func() error { return plainBootstrap(ctx, filepath.Join(dir, fmt.Sprintf("plain%d.tar", i))) })
		if err != nil {
			return times, err
		}
		ours, err := b.makeDefault(ctx, filepath.Join(dir, fmt.Sprint(i)))
		if err != nil {
			return times, err
		}
		times.Plain, times.Ours = append(times.Plain, plain), append(times.Ours, ours)
	}
	return times, nil
}

// makeDefault makes the default image in a new state directory and returns how many seconds it took.
func (b *bench) makeDefault(ctx context.Context, state string) (float64, error) {
	if err := errors.Join(os.MkdirAll(filepath.Join(state, "images"), 0o700), os.Symlink(filepath.Join(b.state, "kernels"), filepath.Join(state, "kernels"))); err != nil {
		return 0, err
	}
	w, err := newWorld(b.bin, state, fakes)
	if err != nil {
		return 0, err
	}
	defer w.end()
	w.env = append(w.env, "BANGER_RUNTIME_DIR="+filepath.Join(state, "runtime")) // a bundle would spare it the making
	return seconds(func() error { return w.banger(ctx, nil, "setup") })
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

// reportBootstraps adds what bootstraps kept.
func (b *bench) reportBootstraps() error {
	text, err := os.ReadFile(filepath.Join(b.cache, bootstrapFile))
	if err != nil {
		return fmt.Errorf("--only-baseline measures it beforehand: %w", err)
	}
	var times bootstrapTimes
	if err := json.Unmarshal(text, &times); err != nil {
		return err
	}
	if times.Missing != "" {
		b.miss("the making of the default image against mmdebstrap: " + times.Missing)
		return nil
	}
	base := b.add(measured("mmdebstrap alone, with the packages of the default image", "s", 0, times.Plain...))
	b.add(measured("making of the default image", "s", 0, times.Ours...).against(base, bootstrapRatio))
	return nil
}

// builds looks at the default image, takes a small recipe through every stage, and boots what came out.
func (b *bench) builds(ctx context.Context) (err error) {
	if err := b.reportBootstraps(); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "bgr-bench-build-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := ownState(ctx, b.state, dir); err != nil {
		return err
	}
	w, err := newWorld(b.bin, dir, building)
	if err != nil {
		return err
	}
	defer w.end()
	base, err := w.defaultImage(ctx)
	if err != nil {
		return err
	}
	size, err := allocated(base.Directory)
	if err != nil {
		return err
	}
	b.add(measured("default image, on disk", "MB", defaultImageMB, float64(size)/1e6))
	built, err := b.build(ctx, w, dir, base.Name)
	if err != nil {
		return err
	}
	return b.bootBuilt(ctx, w, base.Name, built)
}

type listedImage struct {
	Name, Directory string
	IsDefault       bool `json:"is_default"`
}

func (w *world) defaultImage(ctx context.Context) (listedImage, error) {
	var all []listedImage
	if err := w.banger(ctx, &all, "image", "list", "-o", "json"); err != nil {
		return listedImage{}, err
	}
	for _, i := range all {
		if i.IsDefault {
			return i, nil
		}
	}
	return listedImage{}, errors.New("there is no default image")
}

// build builds a small recipe from the image base, with a row for each stage, and returns the name of what it made.
func (b *bench) build(ctx context.Context, w *world, dir, base string) (name string, err error) {
	recipe := filepath.Join(dir, "bench")
	text := fmt.Sprintf("from = %q\n[[step]]\nname = \"work\"\nrun = \"echo made >/srv/made\"\n", "image:"+base)
	if err := errors.Join(os.Mkdir(recipe, 0o700), os.WriteFile(filepath.Join(recipe, "recipe.toml"), []byte(text), 0o600)); err != nil {
		return "", err
	}
	var built struct {
		Image  listedImage
		Stages []struct {
			Stage   string
			Seconds float64
		}
	}
	took, err := seconds(func() error { return w.banger(ctx, &built, "image", "build", recipe, "-o", "json") })
	if err != nil {
		return "", err
	}
	for _, s := range built.Stages {
		limit, known := buildRatios[s.Stage]
		if !known {
			return "", fmt.Errorf("stage %q of a build has no limit", s.Stage)
		}
		b.add(measured("build of a small recipe: "+s.Stage, "s", 0, s.Seconds).against(b.stock, limit))
	}
	b.add(measured("build of a small recipe, in all", "s", 0, took).against(b.stock, buildRatios[""]))
	return built.Image.Name, nil
}

// bootBuilt compares boots of the image that was built with those of the one it was built from, in turns.
func (b *bench) bootBuilt(ctx context.Context, w *world, base, built string) error {
	var agents, banners [2][]float64
	for i := range b.rounds {
		for j, image := range []string{base, built} {
			agent, banner, err := w.coldCreate(ctx, fmt.Sprintf("boot%d-%d", i, j), "--image", image)
			if err != nil {
				return err
			}
			agents[j], banners[j] = append(agents[j], agent), append(banners[j], banner)
		}
	}
	for _, m := range []struct {
		until   string
		samples [2][]float64
	}{{"the agent answers", agents}, {"SSH answers", banners}} {
		of := b.add(measured("create from the default image until "+m.until, "s", 0, m.samples[0]...))
		b.add(measured("create from the built image until "+m.until, "s", 0, m.samples[1]...).against(of, builtBootRatio))
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
