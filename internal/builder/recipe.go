// Package builder builds images from recipes: a base, packages, files and steps that run in a temporary VM, whose
// root file system becomes the image. It also runs the tests of a recipe in the result.
//
// A recipe is a directory with a file recipe.toml; docs/images.md tells its keys. The recipes that came with banger
// are called by their names, others by their directories.
package builder

import (
	"bufio"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"banger/images"
	"banger/internal/fault"
	"banger/internal/tomlfile"
	"banger/internal/vm"
)

// RecipeFile is the file that makes a directory a recipe.
const RecipeFile = "recipe.toml"

// Bounds of a recipe.
const (
	maxRecipe     = 1 << 20  // bytes of recipe.toml or of a list of packages
	maxFiles      = 64 << 20 // bytes of all files of a recipe
	maxCount      = 10_000   // files of a recipe
	maxSteps      = 200
	maxChain      = 8 // recipes that are built on one another
	stepTimeout   = 10 * time.Minute
	maxTimeout    = 6 * time.Hour
	defaultSize   = 8 << 30
	defaultMemory = 1 << 30
)

// Recipe is what recipe.toml says, checked and with its defaults.
type Recipe struct {
	Description string   `toml:"description"`
	From        string   `toml:"from"`         // debian, debian:SUITE, image:NAME[@sha256:DIGEST], recipe:NAME
	Size        string   `toml:"size"`         // what / can grow by while it is built
	Memory      string   `toml:"memory"`       // of the temporary VM
	Packages    []string `toml:"packages"`     // of the base's distribution
	PackageList string   `toml:"package_list"` // a file with more of them, a name in a line
	Modules     []string `toml:"modules"`      // kernel modules to load at each boot
	Files       []File   `toml:"file"`
	Steps       []Step   `toml:"step"`
	Tests       []Step   `toml:"test"`

	Name     string `toml:"-"` // what the image is called
	Origin   string `toml:"-"` // how the recipe is found again: its name, or its directory
	Hash     string `toml:"-"` // over recipe.toml and all files below its directory
	ListHash string `toml:"-"` // over the packages it asks for, sorted
	files    fs.FS
}

// File is one that is put into the image before the steps: what is in Content, or in the recipe's file Source, which
// may be a directory.
type File struct {
	Path    string `toml:"path"`
	Source  string `toml:"source"`
	Content string `toml:"content"`
	Mode    string `toml:"mode"`  // octal; "0644"
	Owner   string `toml:"owner"` // user:group; "root:root"
}

// Step is a script that runs as root in the VM: as /bin/sh -eu, or as its first line says.
type Step struct {
	Name     string `toml:"name" json:"name"`
	Run      string `toml:"run" json:"run"`
	Script   string `toml:"script" json:"-"`                    // a file of the recipe, instead of Run
	Needs    string `toml:"needs" json:"needs,omitempty"`       // "internet" or nothing
	Optional bool   `toml:"optional" json:"optional,omitempty"` // the build goes on without it
	Timeout  string `toml:"timeout" json:"timeout,omitempty"`   // "10m"
}

func (s Step) limit() time.Duration {
	if d, err := time.ParseDuration(s.Timeout); err == nil {
		return d
	}
	return stepTimeout
}

// base kinds of From.
const (
	fromDebian = "debian"
	fromImage  = "image"
	fromRecipe = "recipe"
)

// base takes From apart. rest is a suite, an image or a recipe.
func (r *Recipe) base() (kind, rest string) {
	kind, rest, _ = strings.Cut(r.From, ":")
	return kind, rest
}

// Load reads a recipe: one that came with banger by its name, any other by the absolute path of its directory or its
// recipe.toml.
func Load(ref string) (*Recipe, error) {
	r := &Recipe{Origin: ref, Name: ref, files: nil}
	if filepath.IsAbs(ref) {
		dir := ref
		if filepath.Base(ref) == RecipeFile {
			dir = filepath.Dir(ref)
		}
		r.Origin, r.Name, r.files = dir, filepath.Base(dir), os.DirFS(dir)
	} else {
		sub, err := fs.Sub(images.Recipes, ref)
		if err != nil {
			return nil, unknown(ref)
		}
		r.files = sub
	}
	if _, err := fs.Stat(r.files, RecipeFile); err != nil {
		if filepath.IsAbs(ref) {
			return nil, fault.Wrap(fault.NotFound, err, "there is no recipe in %s", ref).WithHint("give a directory with a file %s in it", RecipeFile)
		}
		return nil, unknown(ref)
	}
	if err := r.read(); err != nil {
		return nil, err
	}
	return r, r.check()
}

func unknown(ref string) error {
	return fault.New(fault.NotFound, "there is no recipe %q", ref).
		WithHint("banger has: %s; of your own give the directory, for instance ./%s", strings.Join(Names(), ", "), ref)
}

// Names returns the recipes that came with banger.
func Names() []string {
	entries, err := fs.ReadDir(images.Recipes, ".")
	if err != nil {
		panic("builder: the recipes are not readable: " + err.Error()) // they are in the program itself
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() {
			names = append(names, e.Name())
		}
	}
	return names
}

func (r *Recipe) read() error {
	text, err := r.readFile(RecipeFile)
	if err != nil {
		return err
	}
	if err := tomlfile.Decode(RecipeFile, []byte(text), r); err != nil {
		return fault.Wrap(fault.Usage, err, "recipe %s", r.Origin)
	}
	if err := r.readPackages(); err != nil {
		return err
	}
	for _, list := range [][]Step{r.Steps, r.Tests} {
		for i := range list {
			if err := r.readScript(&list[i]); err != nil {
				return err
			}
		}
	}
	r.Hash, err = r.sum()
	return err
}

func (r *Recipe) readFile(name string) (string, error) {
	if !fs.ValidPath(path.Clean(name)) {
		return "", fault.New(fault.Usage, "recipe %s: file %q has to lie in the recipe's directory", r.Origin, name)
	}
	b, err := readPlain(r.files, path.Clean(name), maxRecipe)
	if err != nil {
		return "", fault.Wrap(fault.Usage, err, "recipe %s", r.Origin)
	}
	return string(b), nil
}

// readPlain reads a plain file of at most limit bytes. A pipe would not end, so it is not opened.
func readPlain(files fs.FS, name string, limit int64) ([]byte, error) {
	info, err := fs.Stat(files, name)
	switch {
	case err != nil:
		return nil, err
	case !info.Mode().IsRegular():
		return nil, fmt.Errorf("%s is no plain file", name)
	}
	f, err := files.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }()
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	switch {
	case err != nil:
		return nil, fmt.Errorf("cannot read %s: %w", name, err)
	case int64(len(b)) > limit:
		return nil, fmt.Errorf("%s has more than %s", name, vm.FormatSize(limit))
	}
	return b, nil
}

// readPackages adds those of the list to those in the recipe.
func (r *Recipe) readPackages() error {
	if r.PackageList != "" {
		text, err := r.readFile(r.PackageList)
		if err != nil {
			return err
		}
		for lines := bufio.NewScanner(strings.NewReader(text)); lines.Scan(); {
			name, _, _ := strings.Cut(lines.Text(), "#")
			if name = strings.TrimSpace(name); name != "" {
				r.Packages = append(r.Packages, name)
			}
		}
	}
	slices.Sort(r.Packages)
	r.Packages = slices.Compact(r.Packages)
	r.ListHash = hash(strings.Join(r.Packages, "\n"))
	return nil
}

func (r *Recipe) readScript(s *Step) (err error) {
	if s.Script == "" {
		return nil
	}
	if s.Run != "" {
		return fault.New(fault.Usage, "recipe %s: step %q has both run and script", r.Origin, s.Name)
	}
	s.Run, err = r.readFile(s.Script)
	return err
}

func hash(text string) string {
	sum := sha256.Sum256([]byte(text))
	return "sha256:" + hex.EncodeToString(sum[:])
}

// sum is over the names and contents of all files of the recipe, and over which can be executed.
func (r *Recipe) sum() (string, error) {
	h, left, count := sha256.New(), int64(maxFiles), 0
	err := fs.WalkDir(r.files, ".", func(name string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() {
			return err
		}
		if count++; count > maxCount {
			return fmt.Errorf("there are more than %d files in it", maxCount)
		}
		if !d.Type().IsRegular() { // a link would lead out of the directory
			return fmt.Errorf("%s is no plain file", name)
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		if left -= info.Size(); left < 0 {
			return fmt.Errorf("the files have more than %s", vm.FormatSize(maxFiles))
		}
		b, err := readPlain(r.files, name, maxFiles)
		content := sha256.Sum256(b)
		fmt.Fprintf(h, "%q %04o %x\n", name, defaultMode(info), content)
		return err
	})
	if err != nil {
		return "", fault.Wrap(fault.Usage, err, "recipe %s cannot be read", r.Origin)
	}
	return "sha256:" + hex.EncodeToString(h.Sum(nil)), nil
}

var (
	packageName = regexp.MustCompile(`^[a-z0-9][a-z0-9+.:_-]*(=[A-Za-z0-9.+:~-]+)?$`)
	moduleName  = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)
	ownerName   = regexp.MustCompile(`^[a-z_0-9][a-z0-9_-]*(:[a-z_0-9][a-z0-9_-]*)?$`)
	recipeName  = regexp.MustCompile(`^[a-z0-9][a-z0-9-]{0,40}$`)
)

// check refuses what would fail later, or mean something else.
func (r *Recipe) check() error {
	wrong := func(format string, args ...any) *fault.Error {
		return fault.New(fault.Usage, "recipe %s: %s", r.Origin, fmt.Sprintf(format, args...))
	}
	if !recipeName.MatchString(r.Name) {
		return wrong("the directory's name is the image's: lower-case letters, digits and dashes, at most 41").WithHint("rename the directory")
	}
	switch kind, rest := r.base(); {
	case r.From == "":
		return wrong("from is missing: it does not say what it is built on")
	case kind != fromDebian && kind != fromImage && kind != fromRecipe:
		return wrong("from = %q: write debian, debian:SUITE, image:NAME or recipe:NAME", r.From)
	case rest == "" && r.From != fromDebian:
		return wrong("from = %q names nothing after the colon", r.From)
	}
	if r.Size == "" {
		r.Size = strconv.Itoa(defaultSize)
	}
	if r.Memory == "" {
		r.Memory = strconv.Itoa(defaultMemory)
	}
	for _, size := range []string{r.Size, r.Memory} {
		if _, err := vm.ParseSize(size); err != nil {
			return wrong("%v", err)
		}
	}
	for _, p := range r.Packages {
		if !packageName.MatchString(p) {
			return wrong("%q is no name of a package", p)
		}
	}
	for _, m := range r.Modules {
		if !moduleName.MatchString(m) {
			return wrong("%q is no name of a kernel module", m)
		}
	}
	for _, f := range r.Files {
		if err := r.checkFile(f); err != nil {
			return wrong("file %q: %v", f.Path, err)
		}
	}
	if len(r.Steps) > maxSteps || len(r.Tests) > maxSteps {
		return wrong("it has more than %d steps or tests", maxSteps)
	}
	if err := checkSteps("step", r.Steps); err != nil {
		return wrong("%v", err)
	}
	if err := checkSteps("test", r.Tests); err != nil {
		return wrong("%v", err)
	}
	return nil
}

func (r *Recipe) checkFile(f File) error {
	switch {
	case !path.IsAbs(f.Path) || path.Clean(f.Path) != f.Path || f.Path == "/" || strings.ContainsAny(f.Path, "\n\x00"):
		return errors.New("path has to be absolute and plain")
	case (f.Source == "") == (f.Content == ""):
		return errors.New("it needs either source or content")
	case f.Owner != "" && !ownerName.MatchString(f.Owner):
		return fmt.Errorf("owner %q is no user:group", f.Owner)
	}
	if f.Mode != "" {
		if m, err := strconv.ParseUint(f.Mode, 8, 32); err != nil || m > 0o7777 {
			return fmt.Errorf("mode %q is no octal number like 0644", f.Mode)
		}
	}
	if f.Source != "" {
		if !fs.ValidPath(f.Source) {
			return fmt.Errorf("source %q has to lie in the recipe's directory", f.Source)
		}
		_, err := fs.Stat(r.files, f.Source)
		return err
	}
	return nil
}

// checkSteps checks steps, or tests: what says which.
func checkSteps(what string, list []Step) error {
	seen := map[string]bool{}
	for i, s := range list {
		switch {
		case s.Name == "" || strings.ContainsAny(s.Name, "\n\r"):
			return fmt.Errorf("%s %d has no name of one line", what, i+1)
		case seen[s.Name]:
			return fmt.Errorf("there are two %ss %q", what, s.Name)
		case strings.TrimSpace(s.Run) == "":
			return fmt.Errorf("%s %q has nothing to run", what, s.Name)
		case s.Needs != "" && s.Needs != needsInternet:
			return fmt.Errorf("%s %q needs %q: only %q is known", what, s.Name, s.Needs, needsInternet)
		}
		seen[s.Name] = true
		if s.Timeout != "" {
			if d, err := time.ParseDuration(s.Timeout); err != nil || d <= 0 || d > maxTimeout {
				return fmt.Errorf("%s %q: timeout %q is no time up to %s, like 10m", what, s.Name, s.Timeout, maxTimeout)
			}
		}
	}
	return nil
}

const needsInternet = "internet"

// chain returns a recipe and those it is built on, the last of which is built on something else.
func chain(ref string) ([]*Recipe, error) {
	var all []*Recipe
	for {
		r, err := Load(ref)
		if err != nil {
			return nil, err
		}
		for _, before := range all {
			if before.Origin == r.Origin {
				return nil, fault.New(fault.Usage, "recipe %s is built on itself: %s", r.Origin, way(append(all, r)))
			}
		}
		if all = append(all, r); len(all) > maxChain {
			return nil, fault.New(fault.Usage, "more than %d recipes are built on one another: %s", maxChain, way(all))
		}
		kind, rest := r.base()
		if kind != fromRecipe {
			return all, nil
		}
		ref = rest
		if strings.HasPrefix(rest, ".") {
			if !filepath.IsAbs(r.Origin) {
				return nil, fault.New(fault.Usage, "recipe %s: from = %q: it came with banger and has no directory", r.Origin, r.From)
			}
			ref = filepath.Join(r.Origin, rest)
		}
	}
}

func way(all []*Recipe) string {
	var names []string
	for _, r := range all {
		names = append(names, r.Origin)
	}
	return strings.Join(names, " -> ")
}

// testsOfAll returns the form in which an image keeps the tests of its recipe and of those that it is built on.
func testsOfAll(recipes []*Recipe) json.RawMessage {
	var tests []Step
	for _, r := range slices.Backward(recipes) {
		tests = append(tests, r.Tests...)
	}
	b, err := json.Marshal(tests)
	if err != nil {
		panic("builder: tests are not JSON: " + err.Error()) // strings and booleans only
	}
	return b
}

// cutDigest takes "NAME@sha256:DIGEST" apart; the digest may be missing.
func cutDigest(ref string) (name, digest string) {
	name, rest, found := strings.Cut(ref, "@sha256:")
	if found {
		digest = "sha256:" + rest
	}
	return name, digest
}
