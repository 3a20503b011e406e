// Package bench measures banger as its users meet it, through the installed programs, against a stock
// boot of the same system in the same run.
package bench

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"banger/internal/build"
	"banger/internal/disk"
	"banger/internal/system"
)

const (
	killSignal = syscall.SIGKILL
	benchCPUs  = 2
	benchMiB   = 1024
)

// bench drives one private banger.
type bench struct {
	bin, docs string
	rounds    int
	cache     string // kept between runs
	root      string // this run's private directories
	env       []string
	results   []Result
}

// Main runs the bench and returns the exit code: 0 when every limit holds.
func Main(args []string) int {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b := &bench{}
	flags := flag.NewFlagSet("banger-bench", flag.ContinueOnError)
	flags.StringVar(&b.bin, "bin", "bin", "directory of the programs")
	flags.StringVar(&b.docs, "docs", "", "directory of benchmarks.md and benchmarks.json; empty: print only")
	flags.IntVar(&b.rounds, "rounds", 3, "boots of each kind; the median counts")
	state := flags.String("state", "", "state directory with the kernel and image to use")
	only := flags.Bool("only-baseline", false, "make the baseline and end")
	flags.StringVar(&b.cache, "cache", "", "directory for the baseline, kept between runs")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	run := func() error { return b.run(ctx, *state) }
	if *only {
		run = func() error { _, err := makeStock(ctx, b.cache); return err }
	}
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, "banger-bench:", err)
		return 1
	}
	for _, r := range b.results {
		if !r.Holds {
			return 1
		}
	}
	return 0
}

func (b *bench) run(ctx context.Context, state string) (err error) {
	if err := b.prepare(state); err != nil {
		return err
	}
	defer os.RemoveAll(b.root)
	defer b.banger(context.WithoutCancel(ctx), nil, "daemon", "stop") //nolint:errcheck // best effort at the end
	var status struct {
		DefaultVMM string `json:"default_vmm"`
		Drivers    []struct{ Name, Accelerator string }
	}
	if err := b.banger(ctx, &status, "daemon", "status", "-o", "json"); err != nil {
		return err
	}
	machine := thisMachine()
	machine.VMM = status.DefaultVMM
	for _, d := range status.Drivers {
		if d.Name == status.DefaultVMM {
			machine.Accelerator = d.Accelerator
		}
	}
	for _, measure := range []func(context.Context, Machine) error{b.boots, b.commands, b.two, b.many, b.idle} {
		if err := measure(ctx, machine); err != nil {
			return err
		}
	}
	return b.report(Report{Date: today(), Build: build.ID(), Machine: machine, Results: b.results})
}

// prepare makes the private directories, with the given kernels and images linked in.
func (b *bench) prepare(state string) error {
	root, err := os.MkdirTemp("", "banger-bench-")
	if err != nil {
		return err
	}
	b.root = root
	b.env = append(os.Environ(), "XDG_STATE_HOME="+filepath.Join(root, "state"), "XDG_CONFIG_HOME="+filepath.Join(root, "config"),
		"XDG_CACHE_HOME="+filepath.Join(root, "cache"), "XDG_RUNTIME_DIR="+filepath.Join(root, "run"), "BANGER_FAKE_VMM=1")
	own := filepath.Join(root, "state", "banger")
	if err := os.MkdirAll(own, 0o700); err != nil {
		return err
	}
	for _, part := range []string{"images", "kernels"} {
		if err := os.Symlink(filepath.Join(state, part), filepath.Join(own, part)); err != nil {
			return err
		}
	}
	return os.Mkdir(filepath.Join(root, "run"), 0o700)
}

// banger runs the command line; with a result, stdout is decoded into it as JSON.
func (b *bench) banger(ctx context.Context, result any, args ...string) error {
	out, err := system.Run(ctx, system.Command{
		Path: filepath.Join(b.bin, "banger"), Args: args, Env: b.env, Timeout: 5 * time.Minute,
	})
	if err != nil || result == nil {
		return err
	}
	return json.Unmarshal(out, result)
}

func (b *bench) add(r Result) Result {
	b.results = append(b.results, r)
	fmt.Fprintf(os.Stderr, "%-44s %8.4g %s", r.Name, r.Value, r.Unit)
	if r.Of != "" {
		fmt.Fprintf(os.Stderr, "  = %.3f of %s (limit %g)", r.Ratio, r.Of, r.Limit)
	}
	fmt.Fprintln(os.Stderr)
	return r
}

func (b *bench) report(r Report) error {
	if b.docs == "" {
		fmt.Print(r.table())
		return nil
	}
	if err := r.writeJSON(filepath.Join(b.docs, "benchmarks.json")); err != nil {
		return err
	}
	return r.writePage(filepath.Join(b.docs, "benchmarks.md"))
}

// seconds runs f and returns how long it took.
func seconds(f func() error) (float64, error) {
	begin := time.Now()
	err := f()
	return time.Since(begin).Seconds(), err
}

// allocated is what the files below dir take on disk, in bytes.
func allocated(dir string) (int64, error) {
	var sum int64
	err := filepath.WalkDir(dir, func(path string, d os.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		n, err := disk.AllocatedBytes(path)
		sum += n
		return err
	})
	return sum, err
}
