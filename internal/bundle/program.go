package bundle

import (
	"path/filepath"
	"slices"
)

// VMM returns the program of that name that runs machines, when the runtime directory of the running program has it.
// Other programs are not found. A bundle.json that cannot be read is an error: what was installed on purpose is not
// passed over in silence.
func VMM(name string) (path string, found bool, err error) {
	if !slices.Contains(bareNames.vmms, name) {
		return "", false, nil
	}
	place, err := Here()
	if err != nil {
		return "", false, err
	}
	b, err := Read(place.Dir)
	if err != nil {
		return "", false, err
	}
	path = b.Path(b.Manifest.VMMs[name])
	return path, path != "" && isFile(path), nil
}

// Helper returns the program of banger's own of that name: in the directory that DirVariable names, else beside the
// running program, whose build it has, else in the runtime directory. found is false when it is in none of them.
func Helper(name string) (path string, found bool, err error) {
	place, err := Here()
	if err != nil {
		return "", false, err
	}
	self, err := SelfDir()
	if err != nil {
		return "", false, err
	}
	beside, here := filepath.Join(self, name), filepath.Join(place.Dir, name)
	if place.Origin != FromEnvironment && isFile(beside) {
		return beside, true, nil
	}
	// Before bundle.json: `make install` puts them there, of the same build as ours.
	if isFile(here) {
		return here, true, nil
	}
	b, err := Read(place.Dir)
	if err != nil {
		return "", false, err
	}
	for _, path := range []string{b.Path(b.Manifest.Helpers[name]), beside, filepath.Join(placeBeside(self).Dir, name)} {
		if path != "" && isFile(path) {
			return path, true, nil
		}
	}
	return "", false, nil
}
