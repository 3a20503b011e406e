package e2e

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestLife is one VM's life: enter it, keep things in it, stop, start, reboot, power off, throw away.
func TestLife(t *testing.T) {
	w := newWorld(t)
	w.banger("template", "warm") // none is made meanwhile, whose machine would be counted
	if out := w.banger("vm", "create", "web"); out != "web" {
		t.Errorf("create printed %q", out)
	}
	if out := w.guest("web", "cat /etc/hostname"); out != "web" {
		t.Errorf("the guest calls itself %q", out)
	}
	t.Run("exec", func(t *testing.T) { execPassesEverythingThrough(t, w) })
	t.Run("ssh", func(t *testing.T) { sshAsksNothing(t, w) })
	t.Run("modules", func(t *testing.T) {
		w.guest("web", "modprobe dummy && grep -q dummy /proc/modules")
	})

	w.guest("web", "echo kept >/root/work && echo kept >/etc/system")
	first := w.show("web")
	if open := w.taps(); len(open) != 1 {
		t.Errorf("one VM runs, and its TAP device is %v", open)
	}
	w.banger("vm", "stop", "web")
	w.await("web", "stopped", 0)
	if left := w.taps(); len(left) > 0 {
		t.Errorf("a stopped VM keeps %v", left)
	}
	w.banger("vm", "start", "web")
	if out := w.guest("web", "cat /root/work /etc/system"); out != "kept\nkept" {
		t.Errorf("after stop and start: %q", out)
	}
	if again := w.show("web"); again.IP != first.IP {
		t.Errorf("the address changed from %s to %s", first.IP, again.IP)
	}

	t.Run("daemon dies", func(t *testing.T) {
		w.killDaemon()
		if out := w.guest("web", "cat /root/work"); out != "kept" {
			t.Errorf("after the daemon's death: %q", out)
		}
	})
	t.Run("reboot inside", func(t *testing.T) {
		boot := w.guest("web", "cat /proc/sys/kernel/random/boot_id")
		w.guest("web", "systemctl reboot")
		deadline := time.Now().Add(2 * time.Minute)
		for {
			r := w.try("vm", "exec", "web", "--", "cat", "/proc/sys/kernel/random/boot_id")
			if r.code == 0 && strings.TrimSpace(r.stdout) != boot {
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("no new boot: %+v", r)
			}
			time.Sleep(200 * time.Millisecond)
		}
	})
	t.Run("power off inside", func(t *testing.T) {
		w.guest("web", "systemctl poweroff")
		if v := w.await("web", "stopped", time.Minute); v.Error != "" {
			t.Errorf("an orderly power-off is called a failure: %s", v.Error)
		}
	})
	dir := w.show("web").Directory
	w.banger("vm", "delete", "--yes", "web")
	if _, err := os.Stat(dir); err == nil {
		t.Errorf("%s is left", dir)
	}
}

func execPassesEverythingThrough(t *testing.T, w *world) {
	r := w.try("vm", "exec", "web", "--", "sh", "-c", "echo out; echo err >&2; exit 7")
	if r.stdout != "out\n" || !strings.Contains(r.stderr, "err") || r.code != 7 {
		t.Errorf("exec: %+v", r)
	}
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	if r := w.run(ctx, "to stdin", "vm", "exec", "-i", "web", "--", "cat"); r.stdout != "to stdin" {
		t.Errorf("stdin: %+v", r)
	}
	if r := w.try("vm", "exec", "web", "--", "no-such-program"); r.code != 127 {
		t.Errorf("a missing program: %+v", r)
	}
}

func sshAsksNothing(t *testing.T, w *world) {
	r := w.try("vm", "ssh", "web", "--", "echo over ssh; exit 9")
	if r.stdout != "over ssh\n" || r.code != 9 {
		t.Errorf("ssh: %+v", r)
	}
	if !strings.Contains(r.stderr, "banger vm stop web") {
		t.Errorf("ssh did not say that the VM still runs: %q", r.stderr)
	}
}

// TestFsyncSurvivesKill: what the guest was told is on disk is there after the VMM's death.
func TestFsyncSurvivesKill(t *testing.T) {
	w := newWorld(t)
	w.banger("vm", "create", "data")
	for _, file := range []string{"/root/blob", "/var/blob"} {
		w.guest("data", "head -c 8M /dev/urandom >"+file+" && sync "+file+" && sync $(dirname "+file+")")
	}
	sums := w.guest("data", "sha256sum /root/blob /var/blob")
	if err := syscall.Kill(w.show("data").PID, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	v := w.await("data", "failed", 20*time.Second)
	if !strings.Contains(v.Error, "kill") {
		t.Errorf("the reason does not say that it was killed: %q", v.Error)
	}
	w.banger("vm", "start", "data")
	if again := w.guest("data", "sha256sum /root/blob /var/blob"); again != sums {
		t.Errorf("before:\n%s\nafter:\n%s", sums, again)
	}
}

// TestPanic: a guest whose kernel panics is failed, with the reason.
func TestPanic(t *testing.T) {
	w := newWorld(t)
	w.banger("vm", "create", "doomed")
	w.try("vm", "exec", "doomed", "--", "sh", "-c", "echo c >/proc/sysrq-trigger")
	if v := w.await("doomed", "failed", time.Minute); !strings.Contains(v.Error, "panic") {
		t.Errorf("the reason does not say panic: %q", v.Error)
	}
}

// TestTwoAtOnce: both get there, and they reach each other.
func TestTwoAtOnce(t *testing.T) {
	w := newWorld(t)
	var both sync.WaitGroup
	for _, name := range []string{"left", "right"} {
		both.Go(func() {
			if r := w.try("vm", "create", name); r.code != 0 {
				t.Errorf("create %s: %+v", name, r)
			}
		})
	}
	both.Wait()
	if t.Failed() {
		return
	}
	w.guest("left", "timeout 20 bash -c 'until exec 3<>/dev/tcp/"+w.show("right").IP+"/22; do sleep 0.2; done'")
}

// TestInterruptedCreate: Ctrl-C while the guest boots takes everything back.
func TestInterruptedCreate(t *testing.T) {
	w := newColdWorld(t)
	w.banger("daemon", "start")
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	cmd := w.command(ctx, "vm", "create", "never")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	awaitProcess(t, w)
	if err := cmd.Process.Signal(os.Interrupt); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code != 130 {
		t.Errorf("exit code %d, not 130", code)
	}
	nothingLeft(t, w)
}

// TestDaemonDiesDuringBoot: a VM whose create never finished is taken back by the next daemon.
func TestDaemonDiesDuringBoot(t *testing.T) {
	w := newColdWorld(t)
	w.banger("daemon", "start")
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	cmd := w.command(ctx, "vm", "create", "orphan")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	awaitProcess(t, w)
	w.killDaemon()
	_ = cmd.Wait()
	if code := cmd.ProcessState.ExitCode(); code == 0 {
		t.Error("create claims success though its daemon died")
	}
	nothingLeft(t, w)
}

// awaitProcess returns once a VMM works in the world.
func awaitProcess(t *testing.T, w *world) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); len(w.processes()) == 0; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("no VMM was started")
		}
	}
}

func nothingLeft(t *testing.T, w *world) {
	t.Helper()
	if all := w.list(); len(all) > 0 {
		t.Errorf("rows left: %+v", all)
	}
	if left := w.processes(); len(left) > 0 {
		t.Errorf("processes left: %v", left)
	}
	if left := w.taps(); len(left) > 0 {
		t.Errorf("TAP devices left: %v", left)
	}
	if dirs, _ := filepath.Glob(filepath.Join(w.dir, "state/banger/vms/*")); len(dirs) > 0 {
		t.Errorf("directories left: %v", dirs)
	}
}
