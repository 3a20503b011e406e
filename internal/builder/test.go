package builder

import (
	"context"
	"encoding/json"
	"errors"
	"path/filepath"
	"time"

	"banger/internal/fault"
	"banger/internal/progress"
	"banger/internal/undo"
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
	Skipped bool   // what it needs is not there, and it is optional
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
	if i.Manifest.Build == nil {
		return report, fault.New(fault.Precondition, "image %s was not built from a recipe: it has no tests", i.Name).
			WithHint("banger image build makes images that have")
	}
	var tests []Step
	if err := json.Unmarshal(i.Manifest.Build.Definition, &tests); err != nil {
		return report, fault.Wrap(fault.Precondition, err, "the tests of image %s cannot be read", i.Name)
	}
	if len(tests) == 0 {
		return report, fault.New(fault.Precondition, "the recipe of image %s has no tests", i.Name)
	}
	r := &Recipe{Name: "test", Size: "8G", Memory: "1G"}
	j, err := b.newJob(Request{KeepFailed: keepFailed}, []*Recipe{r}, sink)
	if err != nil {
		return report, err
	}
	defer j.close()
	ctx, cancel := context.WithTimeout(ctx, buildTimeout)
	defer cancel()
	forget, err := b.record(j.id)
	if err != nil {
		return report, err
	}
	u := undo.New()
	u.Push("record", func(context.Context) error { return forget() })
	defer u.Unwind(ctx, &err)
	v, _, err := j.boot(ctx, i, u)
	if err != nil {
		return report, j.explain(ctx, err)
	}
	g, err := j.connect(ctx, v)
	if err != nil {
		return report, j.explain(ctx, err)
	}
	defer func() { _ = g.Close() }()
	failed := false
	err = j.stage(StageTest, func() error {
		if err := j.prepare(ctx, g); err != nil {
			return err
		}
		for _, t := range tests {
			o := j.test(ctx, g, t)
			if ctx.Err() != nil {
				return ctx.Err()
			}
			failed = failed || !o.Passed && !o.Skipped
			report.Outcomes = append(report.Outcomes, o)
		}
		return nil
	})
	if err != nil {
		return report, j.explain(ctx, err)
	}
	if failed && keepFailed {
		u.Keep()
		report.VM = v.Spec.Name
		return report, forget()
	}
	return report, nil
}

func (j *job) test(ctx context.Context, g *guest, t Step) Outcome {
	j.log.note("test " + t.Name)
	j.sink.Update(StageTest, t.Name, -1)
	begin := time.Now()
	err := j.runStep(ctx, g, t, StageTest)
	o := Outcome{Name: t.Name, Passed: err == nil, Took: time.Since(begin)}
	if err != nil {
		o.Message, o.Skipped = err.Error(), t.Optional
		var failed *stepError
		if errors.As(err, &failed) {
			o.Message = failed.Error()
		}
		o.Message += " (log: " + filepath.Clean(j.log.path) + ")"
	}
	return o
}
