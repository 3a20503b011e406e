package builder

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"banger/internal/hosttest/need"
)

// TestTmuxBlock: the development image's block is replaced where it is, and the user's own lines survive.
func TestTmuxBlock(t *testing.T) {
	need.Binary(t, "awk")
	const begin = "# banger: begin (replaced when the image is built anew; your own lines go outside of it)\n"
	for name, c := range map[string]struct{ before, want string }{
		"no file":           {"", begin + "new\n# banger: end\n"},
		"own lines":         {"mine\n", "mine\n" + begin + "new\n# banger: end\n"},
		"an older block":    {"above\n" + begin + "old\nold\n# banger: end\nbelow\n", "above\n" + begin + "new\n# banger: end\nbelow\n"},
		"a block cut off":   {begin + "mine\n", begin + "mine\n" + begin + "new\n# banger: end\n"},
		"no newline at end": {"mine", "mine\n" + begin + "new\n# banger: end\n"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			config, content := filepath.Join(dir, "tmux.conf"), filepath.Join(dir, "content")
			write(t, dir, map[string]string{"content": "new\n"})
			if c.before != "" {
				write(t, dir, map[string]string{"tmux.conf": c.before})
			}
			for range 2 { // the second time changes nothing
				if out, err := exec.Command("sh", "../../images/dev/files/tmux-block", config, content).CombinedOutput(); err != nil {
					t.Fatalf("%v: %s", err, out)
				}
				if got, err := os.ReadFile(config); err != nil || string(got) != c.want {
					t.Fatalf("%v, got:\n%s\nwant:\n%s", err, got, c.want)
				}
			}
			if left, err := os.ReadDir(dir); err != nil || len(left) != 2 {
				t.Errorf("files left: %v, %v", left, err)
			}
		})
	}
}
