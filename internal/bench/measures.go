package bench

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// boots compares a cold create with a stock boot, in turns, so that what slows the machine slows both.
func (b *bench) boots(ctx context.Context) error {
	s, e, err := b.baseline(ctx)
	if err != nil {
		return err
	}
	var stockBoots, agents, banners []float64
	for i := range b.rounds {
		took, err := s.boot(ctx, e, benchCPUs, benchMiB)
		if err != nil {
			return err
		}
		stockBoots = append(stockBoots, took.Seconds())
		agent, banner, err := b.real.coldCreate(ctx, fmt.Sprintf("cold%d", i))
		if err != nil {
			return err
		}
		agents, banners = append(agents, agent), append(banners, banner)
	}
	base := b.add(measured("stock boot until SSH", "s", 0, stockBoots...))
	b.stock = base
	b.add(measured("create until the agent answers", "s", 0, agents...).against(base, 0.2))
	b.add(measured("create until SSH answers", "s", 0, banners...).against(base, 0.4))
	return nil
}

// baseline returns the stock system, and how its CPUs are to be run.
func (b *bench) baseline(ctx context.Context) (stock, emulation, error) {
	s, err := makeStock(ctx, b.cache)
	if err != nil {
		return s, emulation{}, err
	}
	e, err := b.emulation(ctx)
	return s, e, err
}

// emulation creates a VM, which also warms the caches, and tells how its CPUs are run.
func (b *bench) emulation(ctx context.Context) (emulation, error) {
	if err := b.real.create(ctx, "warm"); err != nil {
		return emulation{}, err
	}
	v, err := b.real.show(ctx, "warm")
	if err != nil {
		return emulation{}, err
	}
	e, err := emulationOf(filepath.Join(v.Directory, "command.txt"))
	if err != nil {
		return emulation{}, err
	}
	return e, b.real.remove(ctx, "warm")
}

// coldCreate creates a VM and deletes it; it returns the seconds from the start of the command until the
// command ended (the agent answers then), and until the SSH banner.
func (w *world) coldCreate(ctx context.Context, name string, more ...string) (agent, banner float64, err error) {
	begin := time.Now()
	if err := w.create(ctx, name, more...); err != nil {
		return 0, 0, err
	}
	agent = time.Since(begin).Seconds()
	v, err := w.show(ctx, name)
	if err != nil {
		return 0, 0, err
	}
	waiting, cancel := context.WithTimeout(ctx, bootLimit)
	defer cancel()
	if err := awaitBanner(waiting, net.JoinHostPort(v.IP, "22")); err != nil {
		return 0, 0, err
	}
	banner = time.Since(begin).Seconds()
	return agent, banner, w.remove(ctx, name)
}

// commands compares exec over the guest channel with SSH, on one running VM.
func (b *bench) commands(ctx context.Context) error {
	if err := b.real.create(ctx, "busy"); err != nil {
		return err
	}
	if err := b.real.banger(ctx, nil, "vm", "ssh", "busy", "--", "true"); err != nil {
		return err
	}
	var execs, sshs []float64
	for range 10 {
		e, err := seconds(func() error { return b.real.banger(ctx, nil, "vm", "exec", "busy", "--", "true") })
		if err != nil {
			return err
		}
		s, err := seconds(func() error { return b.real.banger(ctx, nil, "vm", "ssh", "busy", "--", "true") })
		if err != nil {
			return err
		}
		execs, sshs = append(execs, e), append(sshs, s)
	}
	base := b.add(measured("ssh NAME true", "s", 0, sshs...))
	b.add(measured("exec NAME true", "s", 0, execs...).against(base, 0.1))
	if err := b.outOf(ctx, "busy"); err != nil {
		return err
	}
	return b.real.remove(ctx, "busy")
}

// outputMiB is how much a program writes for outOf.
const outputMiB = 32

// outOf compares the guest channel with SSH by how long a program's output takes, in turns.
func (b *bench) outOf(ctx context.Context, name string) error {
	var execs, sshs []float64
	for range 3 {
		for verb, to := range map[string]*[]float64{"exec": &execs, "ssh": &sshs} {
			took, err := b.real.output(ctx, "vm", verb, name, "--", "head", "-c", fmt.Sprintf("%dM", outputMiB), "/dev/zero")
			if err != nil {
				return err
			}
			*to = append(*to, took)
		}
	}
	base := b.add(measured("32 MiB of output by ssh", "s", 0, sshs...))
	b.add(measured("32 MiB of output by exec", "s", 0, execs...).against(base, 2))
	return nil
}

// two boots two VMs at once. The second create must not wait for the first: what both take together
// stays below twice what one takes alone on a machine with one CPU for each.
func (b *bench) two(ctx context.Context) error {
	one, err := seconds(func() error { return b.real.create(ctx, "one") })
	if err != nil {
		return err
	}
	ends := make([]float64, 2)
	begin := time.Now()
	group, gctx := errgroup.WithContext(ctx)
	for i := range ends {
		group.Go(func() error {
			err := b.real.create(gctx, fmt.Sprintf("pair%d", i))
			ends[i] = time.Since(begin).Seconds()
			return err
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	base := b.add(measured("create of one VM", "s", 0, one))
	b.add(measured("two creates at once, the slower", "s", 0, max(ends[0], ends[1])).against(base, 3))
	return b.real.remove(ctx, "one", "pair0", "pair1")
}

// many measures what needs no guest: disk, creation and listing with the fake driver.
func (b *bench) many(ctx context.Context) error {
	took, err := seconds(func() error {
		group, gctx := errgroup.WithContext(ctx)
		for i := range 10 {
			group.Go(func() error { return b.fake.create(gctx, fmt.Sprintf("f%d", i)) })
		}
		return group.Wait()
	})
	if err != nil {
		return err
	}
	b.add(measured("ten VMs with the fake driver, in all", "s", 1, took))
	v, err := b.fake.show(ctx, "f0")
	if err != nil {
		return err
	}
	size, err := allocated(v.Directory)
	if err != nil {
		return err
	}
	b.add(measured("disk of a VM before its first boot", "MB", 20, float64(size)/1e6))
	for i := 10; i < 200; i++ {
		if err := b.fake.create(ctx, fmt.Sprintf("f%d", i), "--no-start"); err != nil {
			return err
		}
	}
	var lists []float64
	for range 20 {
		l, err := seconds(func() error { return b.fake.banger(ctx, nil, "vm", "list", "-o", "json") })
		if err != nil {
			return err
		}
		lists = append(lists, l*1000)
	}
	b.add(measured("vm list with 200 VMs", "ms", 50, lists...))
	return nil
}

// idle looks at a daemon that nobody asks anything.
func (b *bench) idle(ctx context.Context) error {
	var status struct {
		PID int `json:"pid"`
	}
	if err := b.fake.banger(ctx, nil, "daemon", "restart"); err != nil {
		return err
	}
	if err := b.fake.banger(ctx, &status, "daemon", "status", "-o", "json"); err != nil {
		return err
	}
	const window = 20 * time.Second
	if err := rest(ctx, 3*time.Second); err != nil {
		return err
	}
	before, err := switches(status.PID)
	if err != nil {
		return err
	}
	if err := rest(ctx, window); err != nil {
		return err
	}
	after, err := switches(status.PID)
	if err != nil {
		return err
	}
	rss, err := statusField(fmt.Sprintf("/proc/%d/status", status.PID), "VmRSS")
	if err != nil {
		return err
	}
	b.add(measured("idle bangerd: memory", "MB", 40, float64(rss)*1024/1e6))
	b.add(measured("idle bangerd: wake-ups", "1/s", 1, float64(after-before)/window.Seconds()))
	return nil
}

// switches sums the voluntary context switches of all threads: each is a wake-up that was slept again.
func switches(pid int) (int64, error) {
	tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/status", pid))
	if err != nil || len(tasks) == 0 {
		return 0, fmt.Errorf("process %d is gone", pid)
	}
	var sum int64
	for _, task := range tasks {
		n, err := statusField(task, "voluntary_ctxt_switches")
		if err != nil {
			return 0, err
		}
		sum += n
	}
	return sum, nil
}

// statusField reads one number of a /proc status file (proc_pid_status(5)); VmRSS is in KiB.
func statusField(path, name string) (int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	for s := bufio.NewScanner(f); s.Scan(); {
		if value, ok := strings.CutPrefix(s.Text(), name+":"); ok {
			return strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(value), " kB"), 10, 64)
		}
	}
	return 0, fmt.Errorf("%s has no %s", path, name)
}
