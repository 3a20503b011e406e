package bench

import (
	"context"
	"fmt"
	"time"

	"golang.org/x/sync/errgroup"
)

// What is measured on VMs restored from memory: ten rounds of each, on VMs of this size.
const (
	restoreRounds = 10
	restoreMemory = "512M"
	restoreSettle = 10 * time.Second // until a new VM counts as idle
	idleVMs       = 10
)

// clone creates a VM from the template; what happens when there is none shows in the numbers.
func (b *bench) clone(ctx context.Context, name string) error {
	return b.restored.banger(ctx, nil, "vm", "create", name, "--cpus", fmt.Sprint(benchCPUs), "--memory", restoreMemory)
}

// restores compares a create from a template with a stock boot.
func (b *bench) restores(ctx context.Context) error {
	warm, err := seconds(func() error {
		return b.restored.banger(ctx, nil, "template", "warm", "--cpus", fmt.Sprint(benchCPUs), "--memory", restoreMemory)
	})
	if err != nil {
		return err
	}
	b.add(measured("making of a template", "s", 0, warm))
	var agents, commands []float64
	for i := range restoreRounds {
		name := fmt.Sprintf("clone%d", i)
		begin := time.Now()
		if err := b.clone(ctx, name); err != nil {
			return err
		}
		agents = append(agents, time.Since(begin).Seconds())
		if err := b.restored.banger(ctx, nil, "vm", "ssh", name, "--", "true"); err != nil {
			return err
		}
		commands = append(commands, time.Since(begin).Seconds())
		if err := b.restored.remove(ctx, name); err != nil {
			return err
		}
	}
	b.add(measured("restored create until the agent answers", "s", 0, agents...).against(b.stock, 1./80).p95Too())
	b.add(measured("restored create until an SSH command is done", "s", 0, commands...).against(b.stock, 1./15).p95Too())
	return nil
}

// fiveAtOnce restores five VMs one after the other, and five at once, each measured by itself.
func (b *bench) fiveAtOnce(ctx context.Context) error {
	alone, took := make([]float64, 5), make([]float64, 5)
	for i := range alone {
		var err error
		if alone[i], err = seconds(func() error { return b.clone(ctx, "alone") }); err != nil {
			return err
		}
		if err := b.restored.remove(ctx, "alone"); err != nil { // it has nothing to do while the next is made
			return err
		}
	}
	var names []string
	group, gctx := errgroup.WithContext(ctx)
	for i := range took {
		name := fmt.Sprintf("five%d", i)
		names = append(names, name)
		group.Go(func() (err error) {
			took[i], err = seconds(func() error { return b.clone(gctx, name) })
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	slowest := 0.
	for _, t := range took {
		slowest = max(slowest, t)
	}
	base := b.add(measured("restored create of one VM", "s", 0, alone...))
	b.add(measured("five restored creates at once, the slowest", "s", 0, slowest).against(base, 4))
	return b.restored.remove(ctx, names...)
}

// idleClones sums the memory of ten idle clones, each page shared out among those that share it (Pss of
// proc_pid_smaps(5)), against that of one alone.
func (b *bench) idleClones(ctx context.Context) error {
	var names []string
	var alone, all float64
	for i := range idleVMs {
		name := fmt.Sprintf("idle%d", i)
		if err := b.clone(ctx, name); err != nil {
			return err
		}
		names = append(names, name)
		if i > 0 && i < idleVMs-1 {
			continue
		}
		if err := rest(ctx, restoreSettle); err != nil {
			return err
		}
		sum, err := b.pss(ctx, names)
		if err != nil {
			return err
		}
		if i == 0 {
			alone = sum
		}
		all = sum
	}
	base := b.add(measured("memory of one idle clone", "MB", 0, alone))
	b.add(measured("memory of ten idle clones", "MB", 0, all).against(base, 2.5))
	return b.restored.remove(ctx, names...)
}

// pss sums what VMs take, in MB.
func (b *bench) pss(ctx context.Context, names []string) (float64, error) {
	var sum float64
	for _, name := range names {
		v, err := b.restored.show(ctx, name)
		if err != nil {
			return 0, err
		}
		kib, err := statusField(fmt.Sprintf("/proc/%d/smaps_rollup", v.PID), "Pss")
		if err != nil {
			return 0, err
		}
		sum += float64(kib) * 1024 / 1e6
	}
	return sum, nil
}

// suspends measures suspend and resume of one VM, again and again.
func (b *bench) suspends(ctx context.Context) error {
	if err := b.clone(ctx, "sleeper"); err != nil {
		return err
	}
	if err := rest(ctx, restoreSettle); err != nil {
		return err
	}
	var suspended, resumed []float64
	for range restoreRounds {
		s, err := seconds(func() error { return b.restored.banger(ctx, nil, "vm", "suspend", "sleeper") })
		if err != nil {
			return err
		}
		r, err := seconds(func() error { return b.restored.banger(ctx, nil, "vm", "resume", "sleeper") })
		if err != nil {
			return err
		}
		suspended, resumed = append(suspended, s), append(resumed, r)
	}
	b.add(measured("suspend", "s", 0, suspended...).against(b.stock, 1./20).p95Too())
	b.add(measured("resume", "s", 0, resumed...).against(b.stock, 1./20).p95Too())
	return b.restored.remove(ctx, "sleeper")
}

// forks measures how long the programs of a 512 MB VM stand still while it is forked, as the fork itself tells.
func (b *bench) forks(ctx context.Context) error {
	if err := b.clone(ctx, "source"); err != nil {
		return err
	}
	if err := rest(ctx, restoreSettle); err != nil {
		return err
	}
	var pauses []float64
	for i := range restoreRounds {
		name := fmt.Sprintf("child%d", i)
		var done struct {
			PauseSeconds float64 `json:"pause_seconds"`
		}
		if err := b.restored.banger(ctx, &done, "vm", "fork", "source", "--name", name, "-o", "json"); err != nil {
			return err
		}
		pauses = append(pauses, done.PauseSeconds)
		if err := b.restored.remove(ctx, name); err != nil {
			return err
		}
	}
	b.add(measured("pause of the source of a fork", "s", 0, pauses...).against(b.stock, 1./40).p95Too())
	return b.restored.remove(ctx, "source")
}

// rest waits, for as long as ctx lets it.
func rest(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}
