package system

import (
	"os/exec"
	"path/filepath"

	"banger/internal/bundle"
	"banger/internal/fault"
)

// Find returns the absolute path of a program: of a VMM that the runtime directory has, else in PATH, else where
// distributions keep administrators' programs, which many users' PATH lacks. When it is missing, the Precondition
// fault's hint names the Debian package that has it.
func Find(program, debianPackage string) (string, error) {
	if path, found, err := bundle.VMM(program); found || err != nil {
		return path, err
	}
	if path, err := exec.LookPath(program); err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, program)); err == nil {
			return path, nil
		}
	}
	return "", fault.New(fault.Precondition, "the program %s is not installed", program).
		WithHint("apt install %s", debianPackage)
}
