// Package bench measures banger as its users meet it, through the installed programs, against a stock
// boot of the same system in the same run.
package bench

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"banger/internal/build"
	"banger/internal/disk"
)

const (
	killSignal = syscall.SIGKILL
	benchCPUs  = 2
	benchMiB   = 1024
)

// bench is one run.
type bench struct {
	bin, docs    string
	parts        string
	firecracker  string // a real one; "" is none
	rounds       int
	cache, state string
	real         *world // VMs that boot
	restored     *world // VMs restored from templates
	fake         *world // the fake driver, for what needs no guest
	stock        Result // the baseline
	results      []Result
	missing      []string // what could not be measured, and why
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
	flags.StringVar(&b.parts, "parts", "", "what to measure beside the baseline, separated by commas: boot, restore, network, names, fake, firecracker, images; empty: all")
	flags.StringVar(&b.firecracker, "firecracker", os.Getenv("BANGER_FIRECRACKER"), "a real Firecracker, to measure its memory")
	flags.StringVar(&b.state, "state", "", "state directory with the kernel and image to use")
	flags.StringVar(&b.cache, "cache", "", "directory for the baseline, kept between runs")
	only := flags.Bool("only-baseline", false, "measure what needs the network, make the baseline, and end")
	if err := flags.Parse(args); err != nil {
		return 2
	}
	// Programs that are started elsewhere are to find each other.
	if dir, err := filepath.Abs(b.bin); err == nil {
		b.bin = dir
	}
	run := b.run
	if *only {
		run = func(ctx context.Context) error {
			_, err := makeStock(ctx, b.cache)
			if err == nil && b.wants("images") {
				err = b.bootstraps(ctx)
			}
			return err
		}
	}
	if err := run(ctx); err != nil {
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

func (b *bench) run(ctx context.Context) (err error) {
	if b.real, err = newWorld(b.bin, b.state, booting); err != nil {
		return err
	}
	defer b.real.end()
	if b.restored, err = newWorld(b.bin, b.state, restored); err != nil {
		return err
	}
	defer b.restored.end()
	if b.fake, err = newWorld(b.bin, b.state, fakes); err != nil {
		return err
	}
	defer b.fake.end()
	machine, err := b.machine(ctx)
	if err != nil {
		return err
	}
	if err := b.boots(ctx); err != nil {
		return err
	}
	for _, part := range []struct {
		name     string
		measures []func(context.Context) error
	}{
		{"boot", []func(context.Context) error{b.commands, b.two}},
		{"restore", []func(context.Context) error{b.restores, b.fiveAtOnce, b.idleClones, b.suspends, b.forks}},
		{"network", []func(context.Context) error{b.taps, b.manyRules, b.throughput}},
		{"names", []func(context.Context) error{b.names}},
		{"fake", []func(context.Context) error{b.daemonMemory, b.many, b.idle}},
		{"firecracker", []func(context.Context) error{b.drivers, b.overhead}},
		{"images", []func(context.Context) error{b.imports, b.builds}},
	} {
		if !b.wants(part.name) {
			continue
		}
		for _, measure := range part.measures {
			if err := measure(ctx); err != nil {
				return err
			}
		}
	}
	return b.report(Report{Date: today(), Build: build.ID(), Machine: machine, Results: b.results, Missing: b.missing})
}

func (b *bench) wants(part string) bool {
	return b.parts == "" || slices.Contains(strings.Split(b.parts, ","), part)
}

// machine tells on what kind of machine this run is, as the daemon sees it.
func (b *bench) machine(ctx context.Context) (Machine, error) {
	var status struct {
		DefaultVMM string `json:"default_vmm"`
		Drivers    []struct{ Name, Accelerator string }
	}
	m := thisMachine()
	if err := b.real.banger(ctx, nil, "daemon", "start"); err != nil {
		return m, err
	}
	if err := b.real.banger(ctx, &status, "daemon", "status", "-o", "json"); err != nil {
		return m, err
	}
	m.VMM = status.DefaultVMM
	for _, d := range status.Drivers {
		if d.Name == status.DefaultVMM {
			m.Accelerator = d.Accelerator
		}
	}
	return m, nil
}

func (b *bench) add(r Result) Result {
	b.results = append(b.results, r)
	fmt.Fprintf(os.Stderr, "%-44s %8.4g %s", r.Name, r.Value, r.Unit)
	if r.P95 > 0 {
		fmt.Fprintf(os.Stderr, " (p95 %.4g)", r.P95)
	}
	if r.Of != "" {
		fmt.Fprintf(os.Stderr, "  = %.4f of %s (limit %.4g)", r.Ratio, r.Of, r.Limit)
	}
	fmt.Fprintln(os.Stderr)
	return r
}

// miss notes what cannot be measured on this machine: no failure, and no silence.
func (b *bench) miss(what string) {
	b.missing = append(b.missing, what)
	fmt.Fprintln(os.Stderr, "not measured:", what)
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
