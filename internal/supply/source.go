package supply

import (
	"io"
	"net/url"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"github.com/google/renameio/v2"
	"github.com/pelletier/go-toml/v2"

	"banger/internal/bundle"
	"banger/internal/download"
	"banger/internal/fault"
	"banger/internal/fileio"
	"banger/internal/tomlfile"
)

// Listing is the content of runtime-bundle.toml: where bundles lie. Unknown keys are errors.
type Listing struct {
	Bundles []Listed `toml:"bundle"`
}

// Listed is one bundle, a table [[bundle]].
type Listed struct {
	Architecture string `toml:"architecture"` // as Go names it: amd64, arm64
	Version      string `toml:"version"`
	URL          string `toml:"url"` // https:, http:, file:, or a path, relative to the listing
	SHA256       string `toml:"sha256"`

	Listing string `toml:"-"` // absolute path of the file that lists it
}

const maxListing = 256 << 10 // bytes

// ReadListing returns the listing in the file at path. A NotFound fault says that there is no such file.
func ReadListing(path string) (Listing, error) {
	var l Listing
	if _, err := fileio.Plain(path); err != nil {
		return l, err
	}
	f, err := os.Open(path)
	if err != nil {
		return l, fault.Wrap(fault.Precondition, err, "cannot read the manifest")
	}
	defer func() { _ = f.Close() }()
	text, err := io.ReadAll(io.LimitReader(f, maxListing+1))
	if err != nil {
		return l, fault.Wrap(fault.Precondition, err, "cannot read %s", path)
	}
	if len(text) > maxListing {
		return l, fault.New(fault.Precondition, "%s is larger than %d bytes: it is no manifest of bundles", path, maxListing).
			WithHint("%s", Local)
	}
	if err := tomlfile.Decode(path, text, &l); err != nil {
		return l, err
	}
	for _, b := range l.Bundles {
		if err := b.check(path); err != nil {
			return l, err
		}
	}
	return l, nil
}

func (b Listed) check(path string) error {
	if b.Architecture == "" || b.URL == "" {
		return fault.New(fault.Usage, "%s: a bundle without architecture or url", path).WithHint("correct the file")
	}
	if err := download.CheckSum(b.SHA256); err != nil {
		return fault.Wrap(fault.Usage, err, "%s", path)
	}
	return nil
}

// Local tells the local story, which the documentation and `make help` tell as well.
const Local = "make a bundle with: banger runtime package; then fetch it with: banger runtime fetch --manifest dist/" + bundle.SourceFile

// Choose reads the listings in order and returns the first bundle for this machine. Files that are not there are passed
// over. Without one, the NotFound fault's hint says how to make one.
func Choose(paths ...string) (Listed, error) {
	for _, path := range paths {
		l, err := ReadListing(path)
		if fault.KindOf(err) == fault.NotFound && len(paths) > 1 {
			continue
		}
		if err != nil {
			return Listed{}, withHint(err)
		}
		for _, b := range l.Bundles {
			if b.Architecture != runtime.GOARCH {
				continue
			}
			if b.Listing, err = filepath.Abs(path); err != nil {
				return b, fault.Wrap(fault.Precondition, err, "cannot find %s", path)
			}
			b.URL, err = resolve(b.Listing, b.URL)
			return b, err
		}
	}
	return Listed{}, fault.New(fault.NotFound, "no bundle for %s is listed in %s", runtime.GOARCH, strings.Join(paths, " or ")).
		WithHint("%s", Local)
}

// withHint says how to make a manifest, where the error does not say what to do already.
func withHint(err error) error {
	if fault.HintOf(err) != "" {
		return err
	}
	return fault.Wrap(fault.KindOf(err), err, "no bundle is chosen").WithHint("%s", Local)
}

// resolve makes a path of what is no web address.
func resolve(listing, address string) (string, error) {
	u, err := url.Parse(address)
	if err == nil && (u.Scheme == "http" || u.Scheme == "https") {
		return address, nil
	}
	if err == nil && u.Scheme == "file" && u.Host == "" && u.Path != "" {
		return u.Path, nil
	}
	if strings.Contains(address, "://") || strings.HasPrefix(address, "file:") {
		return "", fault.New(fault.Usage, "%s: %q is no address to fetch from", listing, address).WithHint("use https://, or a path")
	}
	if filepath.IsAbs(address) {
		return address, nil
	}
	return filepath.Join(filepath.Dir(listing), address), nil
}

// list enters b into the listing at path, in place of one for the same architecture.
func list(path string, b Listed) error {
	l, err := ReadListing(path)
	if err != nil && fault.KindOf(err) != fault.NotFound {
		return err
	}
	l.Bundles = append(slices.DeleteFunc(l.Bundles, func(o Listed) bool { return o.Architecture == b.Architecture }), b)
	text, err := toml.Marshal(l)
	if err == nil {
		err = renameio.WriteFile(path, text, 0o644)
	}
	if err != nil {
		return fault.Wrap(fault.Precondition, err, "cannot write %s", path)
	}
	return nil
}
