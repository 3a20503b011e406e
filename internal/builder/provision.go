package builder

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"banger/internal/fault"
	"banger/internal/image"
)

const (
	workDir        = "/run/banger-build" // gone with the VM: nothing of it gets into the image
	packageTimeout = time.Hour
	fileTimeout    = 5 * time.Minute
	updatePause    = 200 * time.Millisecond // between two lines told as progress
	rootOwner      = "0:0"                  // root:root also where /etc/group names nobody
)

// provision puts into the VM what the recipes say: those that others are built on first.
func (j *job) provision(ctx context.Context, g *guest, base image.Image) error {
	if err := j.prepare(ctx, g); err != nil {
		return err
	}
	if err := j.needTar(ctx, g, base); err != nil {
		return err
	}
	kind, _ := j.recipes[len(j.recipes)-1].base()
	bootstrapped := kind == fromDebian && j.request.From == ""
	for i := len(j.recipes) - 1; i >= 0; i-- {
		r := j.recipes[i]
		if len(r.Packages) > 0 && !bootstrapped {
			if err := j.installPackages(ctx, g, r.Packages, base); err != nil {
				return err
			}
		}
		for _, f := range r.Files {
			j.say("file " + f.Path)
			if err := j.putFile(ctx, g, r, f); err != nil {
				return err
			}
		}
		if err := j.loadModules(ctx, g, r.Modules); err != nil {
			return err
		}
		for _, s := range r.Steps {
			if err := j.step(ctx, g, s); err != nil {
				return err
			}
		}
	}
	return nil
}

func (j *job) say(what string) {
	j.log.note(what)
	j.sink.Update(StageProvision, what, -1)
}

// prepare lets the steps reach the internet as this machine does.
func (j *job) prepare(ctx context.Context, g *guest) error {
	ctx, cancel := context.WithTimeout(ctx, fileTimeout)
	defer cancel()
	if err := g.run(ctx, "umask 077 && mkdir -p "+workDir, nil); err != nil {
		return fault.Wrap(fault.Unexpected, err, "cannot work in the temporary VM")
	}
	env, err := j.b.o.Way.open(ctx, g)
	g.env = env
	return err
}

// needTar refuses a base whose result could not leave the VM: better now than after all the work.
func (j *job) needTar(ctx context.Context, g *guest, base image.Image) error {
	if slices.Contains(j.packages(), "tar") {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, fileTimeout)
	defer cancel()
	if err := g.run(ctx, tarScript, nil); err != nil {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return fault.New(fault.Precondition, "image %s has no GNU tar, with which the result leaves the VM", base.Name).
			WithHint(`add it to the recipe: packages = ["tar"]`)
	}
	return nil
}

// installPackages installs into an image that was not bootstrapped for this recipe, with its own package manager.
func (j *job) installPackages(ctx context.Context, g *guest, names []string, base image.Image) error {
	list := strings.Join(names, " ")
	script := "if command -v apt-get >/dev/null; then\n" +
		"  export DEBIAN_FRONTEND=noninteractive\n  apt-get -q update\n  apt-get -q -y --no-install-recommends -o Dpkg::Options::=--force-confdef -o Dpkg::Options::=--force-confold install " + list + "\n" +
		"elif command -v apk >/dev/null; then apk add " + list + "\n" +
		"else echo \"the image has neither apt-get nor apk\" >&2; exit 1; fi\n"
	s := Step{Name: "packages", Run: script, Needs: needsInternet, Timeout: packageTimeout.String()}
	if err := j.step(ctx, g, s); err != nil {
		return err
	}
	j.log.note("packages installed into " + base.Name)
	return nil
}

// putFile writes a file, or all files below a directory.
func (j *job) putFile(ctx context.Context, g *guest, r *Recipe, f File) error {
	ctx, cancel := context.WithTimeout(ctx, fileTimeout)
	defer cancel()
	owner := f.Owner
	if owner == "" {
		owner = rootOwner
	}
	if f.Source == "" {
		return filed(f.Path, g.put(ctx, f.Path, modeOr(f.Mode, 0o644), owner, strings.NewReader(f.Content)))
	}
	return fs.WalkDir(r.files, f.Source, func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		in, err := r.files.Open(name)
		if err != nil {
			return err
		}
		defer func() { _ = in.Close() }()
		to := path.Join(f.Path, strings.TrimPrefix(name, f.Source))
		return filed(to, g.put(ctx, to, modeOr(f.Mode, defaultMode(info)), owner, in))
	})
}

// defaultMode keeps only whether the file can be executed: what else its mode is depends on the builder's umask.
func defaultMode(info fs.FileInfo) fs.FileMode {
	if info.Mode()&0o100 != 0 {
		return 0o755
	}
	return 0o644
}

func modeOr(wished string, otherwise fs.FileMode) string {
	if wished != "" {
		return wished
	}
	return fmt.Sprintf("%04o", otherwise)
}

func filed(name string, err error) error {
	if err == nil {
		return nil
	}
	return fault.Wrap(fault.Precondition, err, "file %s could not be put into the image", name)
}

// modulesUnit loads modules at boot. systemd's own service for that is one of those that VMs are without.
const modulesUnit = `[Unit]
Description=Kernel modules of the image's recipe
DefaultDependencies=no
Before=sysinit.target
After=systemd-journald.socket

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/sbin/modprobe --all %s

[Install]
WantedBy=sysinit.target
`

// loadModules has kernel modules loaded at each boot, and looks whether the kernel has them.
func (j *job) loadModules(ctx context.Context, g *guest, names []string) error {
	if len(names) == 0 {
		return nil
	}
	const list, unit = "/etc/modules-load.d/recipe.conf", "/etc/systemd/system/recipe-modules.service"
	for file, text := range map[string]string{
		list: "# Written by the recipe.\n" + strings.Join(names, "\n") + "\n",
		unit: fmt.Sprintf(modulesUnit, strings.Join(names, " ")),
	} {
		if err := filed(file, g.put(ctx, file, "0644", rootOwner, strings.NewReader(text))); err != nil {
			return err
		}
	}
	return j.step(ctx, g, Step{
		Name: "kernel modules", Timeout: fileTimeout.String(),
		Run: "for m in " + strings.Join(names, " ") + "; do modprobe \"$m\"; done\n" +
			"if command -v systemctl >/dev/null; then systemctl enable recipe-modules.service; fi\n",
	})
}

// step runs a step. One that is optional and fails is left out, which is told and written down.
func (j *job) step(ctx context.Context, g *guest, s Step) error {
	j.say("step " + s.Name)
	err := j.runStep(ctx, g, s, StageProvision)
	if err == nil || ctx.Err() != nil || !s.Optional {
		return err
	}
	text := fmt.Sprintf("%s: %s", s.Name, lastLine(err))
	j.skipped = append(j.skipped, text)
	j.sink.Notice("the optional step " + text + "; the image is without it")
	return nil
}

func lastLine(err error) string {
	var failed *stepError
	if !errors.As(err, &failed) {
		return err.Error()
	}
	if len(failed.tail) == 0 {
		return failed.reason
	}
	return failed.reason + ": " + failed.tail[len(failed.tail)-1]
}

// stepError is why a script failed, with the last lines of its output.
type stepError struct {
	name, reason string
	tail         []string
	cause        error
}

func (e *stepError) Error() string {
	text := fmt.Sprintf("step %q %s", e.name, e.reason)
	if len(e.tail) > 0 {
		text += "; its last lines:\n  " + strings.Join(e.tail, "\n  ")
	}
	return text
}

func (e *stepError) Unwrap() error { return e.cause }

// runStep runs a script to its end, at most for its time.
func (j *job) runStep(ctx context.Context, g *guest, s Step, stage string) error {
	limit := s.limit()
	limited, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	var last time.Time
	j.log.begin(func(line string) {
		if time.Since(last) >= updatePause {
			last = time.Now()
			j.sink.Update(stage, s.Name+": "+line, -1)
		}
	})
	err := g.script(limited, s)
	if err == nil || ctx.Err() != nil {
		return errors.Join(err, ctx.Err())
	}
	failed := &stepError{name: s.Name, tail: j.log.end(), cause: err}
	kind := fault.Precondition
	var exit *ssh.ExitError
	switch {
	case limited.Err() != nil:
		kind, failed.reason = fault.Timeout, fmt.Sprintf("did not end within %s", limit)
	case errors.As(err, &exit) && exit.Signal() != "":
		failed.reason = "was ended by signal " + exit.Signal()
	case errors.As(err, &exit):
		failed.reason = fmt.Sprintf("failed with exit code %d", exit.ExitStatus())
	default:
		failed.reason = "was cut off: the VM or its SSH server ended (" + err.Error() + ")"
	}
	hint := "mend the step"
	switch {
	case kind == fault.Timeout:
		hint = "give it more time with timeout, or see what it waits for"
	case s.Needs == needsInternet:
		hint = "see whether the VM reaches the internet, or mark the step optional"
	}
	return fault.Wrap(kind, failed, "the build cannot go on").WithHint("%s", hint)
}

// script writes the script to a file and runs it there. Its two outputs come as one, as what it says last is often why it
// failed, and two streams lose their order. What it started in the background ends with it, as the session
// would not be over before: the shell around it, which is the first of their group, tells them to.
func (g *guest) script(ctx context.Context, s Step) error {
	text := s.Run
	if !strings.HasPrefix(text, "#!") {
		text = "#!/bin/sh\nset -eu\n" + text
	}
	const file = workDir + "/step"
	if err := g.put(ctx, file, "0700", rootOwner, strings.NewReader(text)); err != nil {
		return err
	}
	env := "HOME=/root LANG=C.UTF-8 PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "
	if s.Needs == needsInternet {
		env += g.env
	}
	return g.run(ctx, "trap : TERM; cd /root && env "+env+file+" </dev/null 2>&1; code=$?; kill -TERM 0; exit $code", nil)
}
