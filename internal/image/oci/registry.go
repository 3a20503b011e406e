package oci

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sync/errgroup"

	"banger/internal/fault"
)

// How patient we are with a registry.
const (
	answerTimeout = 30 * time.Second // until the first byte of an answer
	stallTimeout  = 60 * time.Second // between two bytes
	fetchers      = 3                // layers fetched at a time
	attempts      = 3                // of a request that failed in a way that may pass
)

// ParseReference returns a reference in full: with the registry and the tag, "docker.io/library/alpine:latest".
func ParseReference(ref string) (string, error) {
	r, err := parse(ref)
	if err != nil {
		return "", err
	}
	return canonical(r), nil
}

func parse(ref string) (name.Reference, error) {
	r, err := name.ParseReference(ref)
	if err == nil {
		err = checkParts(r)
	}
	if err != nil {
		return nil, fault.Wrap(fault.Usage, err, "%q is no reference to an image", ref).
			WithHint("write it like docker.io/library/alpine:3.20")
	}
	return r, nil
}

// checkParts refuses names that lead somewhere else in a path, which the library lets through.
func checkParts(r name.Reference) error {
	if strings.HasPrefix(r.Context().RegistryStr(), ".") {
		return errors.New("a registry's name begins with no dot")
	}
	for part := range strings.SplitSeq(r.Context().RepositoryStr(), "/") {
		if part == "" || strings.HasPrefix(part, ".") { // the grammar of distribution's reference has them begin with a letter or digit
			return fmt.Errorf("%q is no part of a name", part)
		}
	}
	return nil
}

// canonical is the form people know: the library calls Docker's registry by its host.
func canonical(r name.Reference) string {
	registry := r.Context().RegistryStr()
	if registry == name.DefaultRegistry {
		registry = "docker.io"
	}
	separator := ":"
	if _, ok := r.(name.Digest); ok {
		separator = "@"
	}
	return registry + "/" + r.Context().RepositoryStr() + separator + r.Identifier()
}

// Fetch fetches an image from its registry to o.Dir. Who may read it is told by what "docker login" or "podman login"
// left behind. A name that the registry does not know is a NotFound fault.
func Fetch(ctx context.Context, ref string, o Options) (*Image, error) {
	r, err := parse(ref)
	if err != nil {
		return nil, err
	}
	connections := newTransport()
	defer connections.CloseIdleConnections()
	found, err := remote.Image(r,
		remote.WithContext(ctx), remote.WithPlatform(o.platform()), remote.WithAuthFromKeychain(authn.DefaultKeychain),
		remote.WithTransport(impatient{connections, stallTimeout}), remote.WithUserAgent("banger"),
		remote.WithRetryBackoff(remote.Backoff{Duration: 300 * time.Millisecond, Factor: 3, Jitter: 0.2, Steps: attempts}),
	)
	if err != nil {
		return nil, explain(ctx, r, err)
	}
	out, layers, err := describeStored(found, o)
	if err != nil {
		return nil, explain(ctx, r, err)
	}
	out.Reference = canonical(r)
	if err := fetchAll(ctx, out, layers, o); err != nil {
		return nil, explain(ctx, r, err)
	}
	return out, nil
}

func newTransport() *http.Transport {
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.ResponseHeaderTimeout = answerTimeout
	t.DialContext = (&net.Dialer{Timeout: answerTimeout}).DialContext
	return t
}

// fetchAll fetches the layers, each once also when it is there twice, and opens them from their files.
func fetchAll(ctx context.Context, out *Image, layers []v1.Layer, o Options) error {
	if err := roomForLayers(layers, o); err != nil {
		return err
	}
	files := map[string]string{} // by digest
	group, inside := errgroup.WithContext(ctx)
	group.SetLimit(fetchers)
	var done atomic.Int64
	for _, l := range layers {
		digest, size, err := identify(l)
		if err != nil {
			return errors.Join(err, group.Wait())
		}
		path := filepath.Join(o.Dir, digest+".layer")
		opened, err := open(l, func() (io.ReadCloser, error) { return os.Open(path) })
		if err != nil {
			return errors.Join(err, group.Wait())
		}
		out.Layers = append(out.Layers, opened)
		if files[digest] != "" {
			continue
		}
		files[digest] = path
		out.Bytes += size
		group.Go(func() error {
			return fetchLayer(inside, l, path, func(n int) {
				if now := done.Add(int64(n)); o.Progress != nil {
					o.Progress(now, max(out.Bytes, now))
				}
			})
		})
	}
	return group.Wait()
}

// roomForLayers finds a disk too full before anything is fetched.
func roomForLayers(layers []v1.Layer, o Options) error {
	var all int64
	for _, l := range layers {
		_, size, err := identify(l)
		if err != nil {
			return err
		}
		if size < 0 || size > math.MaxInt64-all {
			return fault.New(fault.Precondition, "the image is damaged: it has a layer of %d bytes", size)
		}
		all += size
	}
	return o.hasRoom(all)
}

func identify(l v1.Layer) (digest string, size int64, err error) {
	d, err := l.Digest()
	if err != nil {
		return "", 0, explainDamage(err)
	}
	size, err = l.Size()
	return d.Hex, size, err
}

// fetchLayer writes one layer to a file; the library checks its digest and its size. One that breaks off is
// fetched again.
func fetchLayer(ctx context.Context, l v1.Layer, path string, passed func(int)) error {
	var err error
	for attempt := range attempts {
		if attempt > 0 {
			if err := errors.Join(os.Remove(path), pause(ctx, time.Duration(attempt)*time.Second)); err != nil {
				return err
			}
		}
		if err = fetchOnce(ctx, l, path, passed); err == nil || ctx.Err() != nil || !mayPass(err) {
			return err
		}
	}
	return err
}

// mayPass tells whether it makes sense to ask again: the connection broke, and not that the answer was wrong.
func mayPass(err error) bool {
	var broken net.Error
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.As(err, &broken) && fault.KindOf(err) != fault.Timeout
}

func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func fetchOnce(ctx context.Context, l v1.Layer, path string, passed func(int)) error {
	r, err := l.Compressed()
	if err != nil {
		return err
	}
	release := context.AfterFunc(ctx, func() { _ = r.Close() }) // another layer failed
	err = writeNew(ctx, path, readerFunc(func(b []byte) (int, error) {
		n, err := r.Read(b)
		passed(n)
		return n, err
	}))
	release()
	_ = r.Close() // what it may still say does not matter: all was read and checked, or not
	return err
}

// explain makes a fault of whatever went wrong between us and a registry.
func explain(ctx context.Context, r name.Reference, err error) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	host := r.Context().RegistryStr()
	var answer *transport.Error
	var known *fault.Error
	var slow net.Error
	switch {
	case errors.As(err, &known) && fault.HintOf(err) != "":
		return err
	case errors.As(err, &known):
		return fault.Wrap(known.Kind, err, "cannot fetch %s", canonical(r)).WithHint("try again later, and check that %s is a registry of container images", host)
	case errors.As(err, &answer):
		return refused(r, answer)
	case errors.Is(err, syscallNoSpace):
		return fault.Wrap(fault.Precondition, err, "no room for image %s", canonical(r)).WithHint("free some space")
	case errors.As(err, &slow) && slow.Timeout():
		return fault.Wrap(fault.Timeout, err, "registry %s does not answer", host).WithHint("check the network, then try again")
	}
	return fault.Wrap(fault.Precondition, err, "cannot fetch %s", canonical(r)).WithHint("check that registry %s can be reached", host)
}

func refused(r name.Reference, answer *transport.Error) error {
	what, host := canonical(r), r.Context().RegistryStr()
	switch code := answer.StatusCode; {
	case answer.Request != nil && code == http.StatusNotFound && !strings.HasPrefix(answer.Request.URL.Path, "/v2/"):
		return fault.Wrap(fault.Precondition, answer, "registry %s has us ask for a token where nothing is", host).WithHint("check that %s is a registry of container images", host)
	case code == http.StatusUnauthorized || code == http.StatusForbidden:
		return fault.Wrap(fault.Precondition, answer, "registry %s does not let us read %s", host, what).
			WithHint("check the name; if the image is private, log in first: docker login %s", host)
	case code == http.StatusNotFound:
		return fault.Wrap(fault.NotFound, answer, "registry %s has no image %s", host, what).WithHint("check the name and the tag")
	case code == http.StatusTooManyRequests:
		return fault.Wrap(fault.Precondition, answer, "registry %s wants us to ask less often", host).
			WithHint("wait a while, or log in: docker login %s", host)
	default:
		return fault.Wrap(fault.Precondition, answer, "registry %s answered with an error (%d)", host, code).WithHint("try again later")
	}
}
