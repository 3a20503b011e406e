package bench

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"banger/internal/system"
)

// world is a private banger.
type world struct {
	bin, root string
	env       []string
}

// kind is what a world's VMs are.
type kind int

const (
	booting  kind = iota // real ones that boot
	restored             // real ones, restored from templates
	fakes
	building // as booting, with images of its own
)

// newWorld makes private directories with the kernels and images of a state directory linked in.
func newWorld(bin, state string, k kind) (*world, error) {
	root, err := os.MkdirTemp("", "bgr-bench-")
	if err != nil {
		return nil, err
	}
	w := &world{bin: bin, root: root, env: os.Environ()}
	for variable, dir := range map[string]string{
		"XDG_STATE_HOME": "state", "XDG_CONFIG_HOME": "config", "XDG_CACHE_HOME": "cache", "XDG_RUNTIME_DIR": "run",
	} {
		path := filepath.Join(root, dir)
		if err := os.Mkdir(path, 0o700); err != nil {
			return nil, err
		}
		w.env = append(w.env, variable+"="+path)
	}
	if k == fakes {
		w.env = append(w.env, "BANGER_FAKE_VMM=1")
	}
	config := filepath.Join(root, "config", "banger")
	if err := os.Mkdir(config, 0o700); err != nil {
		return nil, err
	}
	text := fmt.Sprintf("templates = %v\n[network]\nbridge = \"banger%d\"\n", k == restored, k) // all worlds are in one network namespace
	if err := os.WriteFile(filepath.Join(config, "config.toml"), []byte(text), 0o600); err != nil {
		return nil, err
	}
	own := filepath.Join(root, "state", "banger")
	if err := os.Mkdir(own, 0o700); err != nil {
		return nil, err
	}
	for _, part := range []string{"images", "kernels"} {
		if err := os.Symlink(filepath.Join(state, part), filepath.Join(own, part)); err != nil {
			return nil, err
		}
	}
	return w, nil
}

// end deletes all VMs, stops the daemon and removes the directories.
func (w *world) end() {
	ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
	defer cancel()
	var left []shown
	if err := w.banger(ctx, &left, "vm", "list", "-o", "json"); err == nil && len(left) > 0 {
		args := []string{"vm", "delete", "--force", "--yes"}
		for _, v := range left {
			args = append(args, v.Name)
		}
		if err := w.banger(ctx, nil, args...); err != nil {
			fmt.Fprintln(os.Stderr, "banger-bench: clean up:", err)
		}
	}
	if err := w.banger(ctx, nil, "daemon", "stop"); err != nil {
		fmt.Fprintln(os.Stderr, "banger-bench: clean up:", err)
	}
	os.RemoveAll(w.root)
}

// banger runs the command line; with a result, stdout is decoded into it as JSON.
func (w *world) banger(ctx context.Context, result any, args ...string) error {
	out, err := system.Run(ctx, system.Command{
		Path: filepath.Join(w.bin, "banger"), Args: args, Env: w.env, Timeout: 5 * time.Minute,
	})
	if err != nil || result == nil {
		return err
	}
	return json.Unmarshal(out, result)
}

// output runs a command that writes outputMiB, and returns the seconds it took.
func (w *world) output(ctx context.Context, args ...string) (float64, error) {
	out := &counter{}
	took, err := seconds(func() error {
		_, err := system.Run(ctx, system.Command{Path: filepath.Join(w.bin, "banger"), Args: args, Env: w.env, Timeout: 5 * time.Minute, Stdout: out})
		return err
	})
	if err == nil && out.n != outputMiB<<20 {
		err = fmt.Errorf("%v wrote %d bytes", args, out.n)
	}
	return took, err
}

// counter counts what is written.
type counter struct{ n int64 }

func (c *counter) Write(p []byte) (int, error) {
	c.n += int64(len(p))
	return len(p), nil
}

type shown struct {
	Name      string `json:"name"`
	IP        string `json:"ip"`
	Directory string `json:"directory"`
	PID       int    `json:"pid"`
}

func (w *world) create(ctx context.Context, name string, more ...string) error {
	args := []string{"vm", "create", name, "--cpus", strconv.Itoa(benchCPUs), "--memory", fmt.Sprintf("%dM", benchMiB)}
	return w.banger(ctx, nil, append(args, more...)...)
}

func (w *world) show(ctx context.Context, name string) (shown, error) {
	var v shown
	err := w.banger(ctx, &v, "vm", "show", name, "-o", "json")
	return v, err
}

func (w *world) remove(ctx context.Context, names ...string) error {
	return w.banger(ctx, nil, append([]string{"vm", "delete", "--force", "--yes"}, names...)...)
}
