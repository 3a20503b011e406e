package bundle

import (
	"os"
	"path/filepath"

	"banger/internal/fault"
)

// DirVariable is the environment variable that names the runtime directory.
const DirVariable = "BANGER_RUNTIME_DIR"

// SourceFile is the manifest of where to fetch a bundle. It lies at the root of a checkout, which is known by it, and
// in the runtime directory of an installed banger.
const SourceFile = "runtime-bundle.toml"

// Origin is why a directory is the runtime directory.
type Origin string

// The origins.
const (
	FromEnvironment Origin = "environment" // DirVariable names it
	FromCheckout    Origin = "checkout"    // the program was built in a source tree
	FromInstall     Origin = "installed"   // ../lib/banger beside the program
)

// Place is where a runtime directory is, or would be: it need not exist.
type Place struct {
	Dir    string // absolute
	Origin Origin
	Source string // where the SourceFile that came with banger lies, or would
}

// Here returns the place for the running program. A Usage fault says that DirVariable names no absolute path: the
// daemon, which works elsewhere, would understand another one.
func Here() (Place, error) {
	self, err := SelfDir()
	if err != nil {
		return Place{}, err
	}
	p := placeBeside(self)
	dir := os.Getenv(DirVariable)
	if dir == "" {
		return p, nil
	}
	if !filepath.IsAbs(dir) {
		return Place{}, fault.New(fault.Usage, "%s is %q, which is no absolute path", DirVariable, dir).
			WithHint("give the whole path, or unset it")
	}
	p.Dir, p.Origin = filepath.Clean(dir), FromEnvironment
	return p, nil
}

// SelfDir returns the directory of the running program, symbolic links followed.
func SelfDir() (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", fault.Wrap(fault.Precondition, err, "cannot find our own executable")
	}
	if real, err := filepath.EvalSymlinks(self); err == nil {
		self = real
	}
	return filepath.Dir(self), nil
}

func placeBeside(dir string) Place {
	root := filepath.Dir(dir)
	if source := filepath.Join(root, SourceFile); isFile(source) {
		return Place{Dir: filepath.Join(root, "runtime"), Origin: FromCheckout, Source: source}
	}
	installed := filepath.Join(root, "lib", "banger")
	return Place{Dir: installed, Origin: FromInstall, Source: filepath.Join(installed, SourceFile)}
}

func isFile(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular()
}
