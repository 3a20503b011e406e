package builder

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"banger/internal/fault"
)

// write makes a recipe's directory with files, by name and content.
func write(t *testing.T, dir string, files map[string]string) string {
	t.Helper()
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func recipe(t *testing.T, text string) string {
	return write(t, filepath.Join(t.TempDir(), "mine"), map[string]string{RecipeFile: text})
}

func TestRecipesThatCameWithBangerAreSound(t *testing.T) {
	names := Names()
	if len(names) < 2 {
		t.Fatalf("recipes: %v", names)
	}
	for _, name := range names {
		all, err := chain(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		r := all[0]
		if r.Name != name || r.Description == "" || len(r.Tests) == 0 || len(r.Packages) == 0 {
			t.Errorf("%s: %+v", name, r)
		}
		for _, s := range r.Steps { // what is reached by name alone may be gone tomorrow
			if s.Needs == needsInternet && !s.Optional {
				t.Errorf("%s: step %s needs the internet and is not optional", name, s.Name)
			}
		}
	}
}

func TestRecipeIsRead(t *testing.T) {
	dir := write(t, filepath.Join(t.TempDir(), "mine"), map[string]string{
		RecipeFile: `
from = "image:base@sha256:abc"
package_list = "list"
packages = ["zsh", "git"]
[[file]]
path = "/etc/a"
source = "files"
[[step]]
name = "one"
script = "steps/one"
needs = "internet"
optional = true
timeout = "90s"
`,
		"list": "# those\ngit # again\n\nvim\n", "files/a": "a", "steps/one": "#!/bin/bash\ntrue\n",
	})
	r, err := Load(filepath.Join(dir, RecipeFile))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Join(r.Packages, " "); got != "git vim zsh" {
		t.Errorf("packages %q", got)
	}
	if r.Name != "mine" || r.Origin != dir || r.Steps[0].Run != "#!/bin/bash\ntrue\n" || r.Steps[0].limit().Seconds() != 90 {
		t.Errorf("%+v", r)
	}
	if name, digest := cutDigest("base@sha256:abc"); name != "base" || digest != "sha256:abc" {
		t.Errorf("%q %q", name, digest)
	}
}

// TestHashTellsEachFile: an image is stale as soon as any file of its recipe is another one, and only then.
func TestHashTellsEachFile(t *testing.T) {
	files := map[string]string{RecipeFile: "from = \"debian\"\npackage_list = \"list\"\n", "list": "git\n", "files/a": "a"}
	dir := write(t, filepath.Join(t.TempDir(), "mine"), files)
	load := func() *Recipe {
		r, err := Load(dir)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	first := load()
	if again := load(); again.Hash != first.Hash {
		t.Error("the same files have another hash")
	}
	if err := os.Chmod(filepath.Join(dir, "files/a"), 0o755); err != nil {
		t.Fatal(err)
	}
	if load().Hash == first.Hash {
		t.Error("that a file can be executed by now is not told")
	}
	if err := os.Chmod(filepath.Join(dir, "files/a"), 0o600); err != nil {
		t.Fatal(err)
	}
	if load().Hash != first.Hash {
		t.Error("what else a mode is depends on who checked the recipe out")
	}
	for name, text := range files {
		write(t, dir, map[string]string{name: text + "\n# more\n"})
		now := load()
		if now.Hash == first.Hash {
			t.Errorf("a change of %s is not told", name)
		}
		if now.ListHash != first.ListHash {
			t.Errorf("a comment in %s changed what packages there are", name)
		}
		write(t, dir, map[string]string{name: text})
	}
}

func TestBadRecipesAreRefused(t *testing.T) {
	const head = "from = \"debian\"\n"
	step := func(lines string) string { return head + "[[step]]\nname = \"a\"\n" + lines }
	for name, c := range map[string]struct{ text, want string }{
		"unknown key":       {head + "pakages = [\"git\"]\n", `recipe.toml:2: unknown key "pakages"`},
		"unknown step key":  {step("run = \"true\"\nretry = 3\n"), `recipe.toml:5: unknown key "step.retry"`},
		"no toml":           {"from = \n", "recipe.toml:1:8:"},
		"wrong type":        {head + "packages = 3\n", "recipe.toml:2:12:"},
		"no base":           {"description = \"x\"\n", "from is missing"},
		"strange base":      {"from = \"ubuntu\"\n", "write debian"},
		"base without name": {"from = \"image:\"\n", "names nothing"},
		"size":              {head + "size = \"much\"\n", "much"},
		"package":           {head + "packages = [\"git; rm -rf /\"]\n", "no name of a package"},
		"package option":    {head + "packages = [\"-o\"]\n", "no name of a package"},
		"module":            {head + "modules = [\"../x\"]\n", "no name of a kernel module"},
		"no list":           {head + "package_list = \"none\"\n", "none"},
		"list outside":      {head + "package_list = \"../list\"\n", "list"},
		"relative file":     {head + "[[file]]\npath = \"etc/a\"\ncontent = \"a\"\n", "absolute"},
		"file way up":       {head + "[[file]]\npath = \"/etc/../../a\"\ncontent = \"a\"\n", "absolute"},
		"file of nothing":   {head + "[[file]]\npath = \"/etc/a\"\n", "either source or content"},
		"file outside":      {head + "[[file]]\npath = \"/etc/a\"\nsource = \"../a\"\n", "in the recipe's directory"},
		"file mode":         {head + "[[file]]\npath = \"/etc/a\"\ncontent = \"a\"\nmode = \"rw\"\n", "octal"},
		"file owner":        {head + "[[file]]\npath = \"/etc/a\"\ncontent = \"a\"\nowner = \"a b\"\n", "user:group"},
		"step of nothing":   {step(""), "nothing to run"},
		"two ways":          {step("run = \"true\"\nscript = \"a\"\n"), "both run and script"},
		"no script":         {step("script = \"a\"\n"), "a"},
		"need":              {step("run = \"true\"\nneeds = \"luck\"\n"), "only \"internet\""},
		"timeout":           {step("run = \"true\"\ntimeout = \"soon\"\n"), "no time up to"},
		"twice":             {step("run = \"true\"\n[[step]]\nname = \"a\"\nrun = \"true\"\n"), "two steps"},
		"tests alike":       {"from = \"image:x\"\n[[test]]\nname = \"a\"\nrun = \"true\"\n[[test]]\nname = \"a\"\nrun = \"true\"\n", "two tests"},
		"list elsewhere":    {"from = \"image:x\"\npackage_list = \"/etc/passwd\"\n", "has to lie in the recipe's directory"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Load(recipe(t, c.text))
			if fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v", err)
			}
		})
	}
	for name, spoil := range map[string]func(dir string) error{
		"a pipe as the recipe": func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, RecipeFile)), unix.Mkfifo(filepath.Join(dir, RecipeFile), 0o600))
		},
		"a pipe":       func(dir string) error { return unix.Mkfifo(filepath.Join(dir, "pipe"), 0o600) },
		"a link":       func(dir string) error { return os.Symlink("/etc/passwd", filepath.Join(dir, "link")) },
		"a large file": func(dir string) error { return sparse(filepath.Join(dir, "blob"), maxFiles+1) },
		"large files": func(dir string) error {
			return errors.Join(sparse(filepath.Join(dir, "a"), maxFiles), sparse(filepath.Join(dir, "b"), 1))
		},
		"an endless file":    func(dir string) error { return sparse(filepath.Join(dir, "blob"), 1<<40) },
		"not to be read":     func(dir string) error { return os.MkdirAll(filepath.Join(dir, RecipeFile+"/x"), 0o700) },
		"a link as a recipe": func(dir string) error { return relink(filepath.Join(dir, RecipeFile), "/dev/zero") },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if name != "not to be read" {
				dir = recipe(t, head)
			}
			if err := spoil(dir); err != nil {
				t.Fatal(err)
			}
			if _, err := Load(dir); fault.KindOf(err) != fault.Usage {
				t.Errorf("%v", err)
			}
		})
	}
	if _, err := Load("no-such"); fault.KindOf(err) != fault.NotFound || !strings.Contains(fault.HintOf(err), "dev") {
		t.Errorf("an unknown name: %v, hint %q", err, fault.HintOf(err))
	}
	if _, err := Load("../../etc"); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a way out: %v", err)
	}
	if _, err := Load(t.TempDir()); fault.KindOf(err) != fault.NotFound {
		t.Errorf("a directory without a recipe: %v", err)
	}
}

// sparse makes a file of zeros that takes no room.
func sparse(path string, size int64) error {
	return errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size))
}

func relink(path, to string) error { return errors.Join(os.Remove(path), os.Symlink(to, path)) }

func TestRecipesOnOneAnother(t *testing.T) {
	root := t.TempDir()
	write(t, filepath.Join(root, "a"), map[string]string{RecipeFile: "from = \"recipe:../b\"\npackages = [\"a\"]\n"})
	write(t, filepath.Join(root, "b"), map[string]string{RecipeFile: "from = \"recipe:small\"\npackages = [\"b\"]\n"})
	all, err := chain(filepath.Join(root, "a"))
	if err != nil {
		t.Fatal(err)
	}
	if got := way(all); got != filepath.Join(root, "a")+" -> "+filepath.Join(root, "b")+" -> small" {
		t.Errorf("chain %s", got)
	}
	before := hashOf(all)
	write(t, filepath.Join(root, "b"), map[string]string{"more": "x"})
	if all, err = chain(filepath.Join(root, "a")); err != nil || hashOf(all) == before {
		t.Errorf("a change of the recipe below is not told: %v", err)
	}

	write(t, filepath.Join(root, "b"), map[string]string{RecipeFile: "from = \"recipe:../a\"\n"})
	if _, err := chain(filepath.Join(root, "a")); fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), "built on itself") {
		t.Errorf("a cycle: %v", err)
	}
	for i := range 12 {
		write(t, filepath.Join(root, fmt.Sprintf("n%d", i)), map[string]string{RecipeFile: fmt.Sprintf("from = \"recipe:../n%d\"\n", i+1)})
	}
	if _, err := chain(filepath.Join(root, "n0")); fault.KindOf(err) != fault.Usage || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a long chain: %v", err)
	}
}

func FuzzRecipe(f *testing.F) {
	f.Add("from = \"debian\"\n[[step]]\nname = \"a\"\nrun = \"true\"\n")
	f.Add("[[file]]\npath = \"/a\"\nmode = \"8\"\n")
	f.Fuzz(func(t *testing.T, text string) {
		dir := write(t, filepath.Join(t.TempDir(), "mine"), map[string]string{RecipeFile: text})
		r, err := Load(dir)
		if err != nil {
			if kind := fault.KindOf(err); kind != fault.Usage {
				t.Errorf("kind %v: %v", kind, err)
			}
			return
		}
		for _, s := range append(r.Steps, r.Tests...) {
			if s.limit() <= 0 || s.limit() > maxTimeout {
				t.Errorf("a step may take %s", s.limit())
			}
		}
	})
}
