package builder

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"strings"
	"time"

	"banger/internal/fault"
	"banger/internal/image"
	"banger/internal/progress"
	"banger/internal/undo"
	"banger/internal/vm"
)

// Report is how the tests of an image went.
type Report struct {
	Image    string
	Outcomes []Outcome
	VM       string // that was left to look into; empty: none was
}

// Outcome is how one test went.
type Outcome struct {
	Name    string
	Passed  bool
	Skipped bool   // it is optional, and its step was left out or it needs the internet
	Message string // why it did not pass
	Took    time.Duration
}

// Test boots an image and runs the tests of the recipe that it was built from.
func (b *Builder) Test(ctx context.Context, name string, keepFailed bool, sink progress.Sink) (report Report, err error) {
	i, err := b.o.Images.Get(ctx, name)
	if err != nil {
		return report, err
	}
	report.Image = i.Name
	tests, err := testsOf(i)
	if err != nil {
		return report, err
	}
	r := &Recipe{Name: "test", Size: "8G", Memory: "1G"}
	j, err := b.newJob(Request{KeepFailed: keepFailed}, []*Recipe{r}, sink)
	if err != nil {
		return report, err
	}
	defer j.close()
	j.what = "the tests of image " + i.Name
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	if err := j.testAll(ctx, i, tests, &report); err != nil {
		return report, j.explain(ctx, err)
	}
	return report, nil
}

// testsOf returns the tests that an image keeps of its recipe.
func testsOf(i image.Image) (tests []Step, err error) {
	if i.Manifest.Build == nil {
		return nil, fault.New(fault.Precondition, "image %s was not built from a recipe: it has no tests", i.Name).
			WithHint("banger image build makes images that have")
	}
	if err := json.Unmarshal(i.Manifest.Build.Definition, &tests); err != nil {
		return nil, fault.Wrap(fault.Precondition, err, "the tests of image %s cannot be read", i.Name)
	}
	if len(tests) == 0 {
		return nil, fault.New(fault.Precondition, "the recipe of image %s has no tests", i.Name)
	}
	return tests, nil
}

// testAll boots the image, runs the tests and takes the VM back, unless one failed and it is to stay.
func (j *job) testAll(ctx context.Context, i image.Image, tests []Step, report *Report) (err error) {
	forget, err := j.b.record(j.id)
	if err != nil {
		return err
	}
	u := undo.New()
	defer func() { err = j.takeBack(ctx, u, forget, err) }()
	v, _, err := j.boot(ctx, i, u)
	if err != nil {
		return err
	}
	failed, err := j.runTests(ctx, v, i, tests, report)
	if err == nil && failed && j.request.KeepFailed {
		u.Keep()
		report.VM = v.Spec.Name
		return j.keep(v.Spec.Name, nil)
	}
	return err
}

// runTests tells whether one failed.
func (j *job) runTests(ctx context.Context, v vm.VM, i image.Image, tests []Step, report *Report) (failed bool, err error) {
	ctx, stop := j.watch(ctx)
	defer func() { err = stop(err) }()
	g, err := j.connect(ctx, v)
	if err != nil {
		return false, err
	}
	defer func() { _ = g.Close() }()
	err = j.stage(StageTest, func() error {
		if err := j.prepare(ctx, g); err != nil {
			return err
		}
		for _, t := range tests {
			o := j.test(ctx, g, t, i.Manifest.Build.Incomplete)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			failed = failed || !o.Passed && !o.Skipped
			report.Outcomes = append(report.Outcomes, o)
		}
		return nil
	})
	return failed, err
}

// test runs one test. That of a step which was left out is not run, and one that is optional may fail for want of the
// internet.
func (j *job) test(ctx context.Context, g *guest, t Step, leftOut []string) Outcome {
	j.log.note("test " + t.Name)
	for _, line := range leftOut {
		if t.Optional && strings.HasPrefix(line, t.Name+": ") {
			return Outcome{Name: t.Name, Skipped: true, Message: "its step was left out when the image was built: " + strings.TrimPrefix(line, t.Name+": ")}
		}
	}
	j.sink.Update(StageTest, t.Name, -1)
	begin := time.Now()
	err := j.runStep(ctx, g, t, StageTest)
	o := Outcome{Name: t.Name, Passed: err == nil, Took: time.Since(begin)}
	if err != nil {
		o.Message, o.Skipped = err.Error(), t.Optional && t.Needs == needsInternet
		var failed *stepError
		if errors.As(err, &failed) {
			o.Message = failed.Error()
		}
		o.Message += " (log: " + filepath.Clean(j.log.path) + ")"
	}
	return o
}
