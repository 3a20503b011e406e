package cli

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"syscall"
	"testing"
	"time"

	"github.com/cavaliergopher/cpio"
	"github.com/rogpeppe/go-internal/testscript"

	bangerv1 "banger/api/banger/v1"
	"banger/internal/artifact"
	"banger/internal/client"
	"banger/internal/daemon"
	"banger/internal/disk"
	"banger/internal/fault"
	"banger/internal/hosttest/need"
	"banger/internal/image"
	"banger/internal/kernel"
	"banger/internal/paths"
)

// TestMain makes this test binary banger and bangerd as well, when it is called so.
func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){
		"banger":  func() { os.Exit(Main(FromOS())) },
		"bangerd": func() { os.Exit(mainDaemon()) },
	})
}

// pauseVariable names a stage after which the daemon pauses, so that a session can do something meanwhile: as long as there is
// a file called paused in its state directory.
const pauseVariable = "BANGER_TEST_PAUSE"

func pause() {
	mark := filepath.Join(paths.FromEnvironment().State, "paused")
	if err := os.WriteFile(mark, nil, 0o600); err != nil {
		panic(err)
	}
	time.Sleep(2 * time.Second)
	_ = os.Remove(mark)
}

func mainDaemon() int {
	stage := os.Getenv(pauseVariable)
	if stage == "" || len(os.Args) > 1 {
		return daemon.Main(os.Args[1:])
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	return fault.ExitCode(daemon.Run(ctx, daemon.Options{
		Paths: paths.FromEnvironment(), FakeVMM: true,
		AfterStage: func(_, ended string) {
			if ended == stage {
				pause()
			}
		},
	}))
}

// TestSessions runs the sessions of testdata/script, each with a daemon of its own that runs fake
// VMs, and an image and a kernel with nothing in them.
func TestSessions(t *testing.T) {
	need.Binary(t, "mke2fs")
	stock := filepath.Join(t.TempDir(), "state")
	stockShelves(t, paths.Under(stock))
	testscript.Run(t, testscript.Params{
		Dir: "testdata/script", RequireExplicitExec: false, RequireUniqueNames: true, UpdateScripts: *update,
		Setup:    func(e *testscript.Env) error { return setupSession(e, paths.Under(stock)) },
		Cmds:     map[string]func(*testscript.TestScript, bool, []string){"exits": exits},
		Deadline: time.Now().Add(2 * time.Minute),
	})
}

// setupSession gives a session its own directories. The runtime directory has a short path of its own,
// for the socket in it.
func setupSession(e *testscript.Env, stock paths.Paths) error {
	run, err := os.MkdirTemp("", "bgr")
	if err != nil {
		return err
	}
	state := filepath.Join(e.WorkDir, "state")
	for variable, value := range map[string]string{
		"XDG_STATE_HOME": state, "XDG_CONFIG_HOME": filepath.Join(e.WorkDir, "config"),
		"XDG_CACHE_HOME": filepath.Join(e.WorkDir, "cache"), "XDG_RUNTIME_DIR": run, "BANGER_FAKE_VMM": "1",
		"STATE": filepath.Join(state, "banger"), "CACHE": filepath.Join(e.WorkDir, "cache", "banger"),
		"CONFIG": filepath.Join(e.WorkDir, "config", "banger"),
	} {
		e.Setenv(variable, value)
	}
	p := paths.Paths{
		Config: filepath.Join(e.WorkDir, "config/banger"), State: filepath.Join(state, "banger"),
		Cache: filepath.Join(e.WorkDir, "cache/banger"), Runtime: filepath.Join(run, "banger"),
	}
	e.Defer(func() {
		endSession(e, p)
		_ = os.RemoveAll(run)
	})
	for from, to := range map[string]string{stock.Images(): p.Images(), stock.Kernels(): p.Kernels()} {
		if err := os.CopyFS(to, os.DirFS(from)); err != nil {
			return err
		}
	}
	return nil
}

// endSession deletes what the session left and stops its daemon.
func endSession(e *testscript.Env, p paths.Paths) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, client.Options{Paths: p})
	if err != nil {
		return // no daemon was started
	}
	defer c.Close()
	if res, err := c.VMs.ListVMs(ctx, &bangerv1.ListVMsRequest{}); err == nil {
		for _, v := range res.GetVms() {
			if err := c.Delete(ctx, &bangerv1.DeleteVMRequest{Vm: v.GetId(), Force: true}, nil); err != nil {
				e.T().Log("delete ", v.GetName(), ": ", err)
			}
		}
	}
	if _, err := client.Stop(ctx, p); err != nil {
		e.T().Log("stop the daemon: ", err)
	}
}

// exits runs a program and wants an exit code: exits 3 banger vm show gone.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM ARG...")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	code := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		code = exit.ExitCode()
	}
	if code != want {
		ts.Fatalf("exit code %d, want %d", code, want)
	}
}

// stockShelves makes an image and a kernel that look whole.
func stockShelves(t *testing.T, p paths.Paths) {
	t.Helper()
	images, kernels := artifact.Open(p.Images(), "image", "image.json"), artifact.Open(p.Kernels(), "kernel", "kernel.json")
	name, err := images.Build(func(dir string) (string, any, error) {
		files := emptyDisks(t, dir, "root.ext4", "work-seed.ext4")
		return "test", image.Manifest{
			Name: "test", Digest: artifact.Digest(files), Description: "nothing", Architecture: runtime.GOARCH, Files: files,
			CreatedAt: time.Now(),
		}, nil
	})
	if err == nil {
		err = images.SetDefault(name)
	}
	if err != nil {
		t.Fatal(err)
	}
	name, err = kernels.Build(func(dir string) (string, any, error) {
		files := emptyDisks(t, dir, "modules.ext4")
		for _, name := range []string{"vmlinuz", "vmlinux", "config"} {
			write(t, filepath.Join(dir, name), name)
		}
		var modules bytes.Buffer
		if err := cpio.NewWriter(&modules).Close(); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(dir, "boot-modules.cpio"), modules.String())
		plain, err := artifact.Describe(dir, "vmlinuz", "vmlinux", "boot-modules.cpio", "config")
		return "test", kernel.Manifest{
			Name: "test", Release: "1.0-test", Architecture: runtime.GOARCH, Files: append(files, plain...), CreatedAt: time.Now(),
		}, err
	})
	if err == nil {
		err = kernels.SetDefault(name)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func emptyDisks(t *testing.T, dir string, names ...string) []artifact.File {
	t.Helper()
	for _, name := range names {
		if err := disk.CreateExt4(t.Context(), filepath.Join(dir, name), 64<<20, "test"); err != nil {
			t.Fatal(err)
		}
	}
	files, err := artifact.Describe(dir, names...)
	if err != nil {
		t.Fatal(err)
	}
	return files
}
